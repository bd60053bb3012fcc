"""Whether a text has the server's watermark: python examples/detect_watermark.py < text

Above 4, chance would say so of one text in thirty thousand. `--key` and `--gamma` are the server's
`watermark_key` and `watermark_gamma`; the tokens are the server's, too.
"""

import argparse
import itertools
import json
import math
import sys
import urllib.request

WORD = (1 << 32) - 1


def mix(x: int) -> int:
    x = (x ^ x >> 16) * 0x21F0AAAD & WORD
    x = (x ^ x >> 15) * 0x735A2D97 & WORD
    return x ^ x >> 15


def is_green(previous: int, token: int, key: int, gamma: float) -> bool:
    state = mix(previous ^ key)
    return mix(mix(token ^ state) + state & WORD) < int(gamma * (WORD + 1))


def z_score(ids: list[int], key: int = 15485863, gamma: float = 0.5) -> float:
    """Standard deviations above what chance gives; a pair that comes again says nothing new."""
    pairs = set(itertools.pairwise(ids))
    green = sum(is_green(previous, token, key, gamma) for previous, token in pairs)
    return (green - gamma * len(pairs)) / math.sqrt(max(1, len(pairs) * gamma * (1 - gamma)))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Look for the server's watermark in a text.")
    parser.add_argument("--url", default="http://127.0.0.1:8080")
    parser.add_argument("--key", type=int, default=15485863)
    parser.add_argument("--gamma", type=float, default=0.5)
    given = parser.parse_args()
    asked = json.dumps({"inputs": sys.stdin.read(), "add_special_tokens": False}).encode()
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{given.url}/tokenize", asked, headers)
    with urllib.request.urlopen(request) as reply:
        ids = [token["id"] for token in json.load(reply)]
    print(f"{z_score(ids, given.key, given.gamma):.1f}")
