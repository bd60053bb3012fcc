"""A decode step of a model like Llama without its attention, for measuring LoRA beside the rest.

Linear layers by cuBLAS with random weights, and the steps between them in plain Triton: what is
fused with LoRA replaces them. Everything runs on the current stream, and can be captured.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from benchmarks.lora_world import Sizes, Step
from gpu_worker.kernels.triton_lora import DOWN, GATE_UP, OUT, QKV, TritonLora
from gpu_worker.kernels.triton_step import StepTables

EPS = 1e-5
BLOCK_TOKENS = 256


class Design(NamedTuple):
    """Which parts of LoRA are folded into what. All False: shrink, matmul, expand in a row.

    beside    shrink on a second stream, beside the matmul
    silu      expand of gate and up with silu(gate) * up
    rotary    expand of q, k, v with the rotary embedding and the way into the cache
    residual  expand of o and down with the residual add, and the next shrink with the norm
    """

    beside: bool = False
    silu: bool = False
    rotary: bool = False
    residual: bool = False


@triton.jit
def add_norm_kernel(x, y, weight, normed, eps, N: tl.constexpr, BLOCK: tl.constexpr):
    """x += y; normed = rms_norm(x) * weight; a program per row."""
    row = tl.program_id(0).to(tl.int64) * N
    cols = tl.arange(0, BLOCK)
    mask = cols < N
    total = tl.load(x + row + cols, mask=mask, other=0.0).to(tl.float32)
    total += tl.load(y + row + cols, mask=mask, other=0.0).to(tl.float32)
    total = total.to(x.dtype.element_ty)
    tl.store(x + row + cols, total, mask=mask)
    total = total.to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(total * total, axis=0) / N + eps)
    scaled = total * scale * tl.load(weight + cols, mask=mask, other=0.0).to(tl.float32)
    tl.store(normed + row + cols, scaled, mask=mask)


@triton.jit
def silu_kernel(gate_up, act, N: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < N
    gate = tl.load(gate_up + row * 2 * N + cols, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * N + N + cols, mask=mask, other=0.0).to(tl.float32)
    tl.store(act + row * N + cols, gate / (1.0 + tl.exp(-gate)) * up, mask=mask)


@triton.jit
def rotary_kernel(
    qkv, cos, sin, positions, kv_slots, kv_cache,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK_TOKENS: tl.constexpr,
):  # fmt: skip
    """A program per token and head."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    d = tl.arange(0, HALF)
    block = qkv + (token * (HEADS + 2 * KV_HEADS) + head) * 2 * HALF + d
    low = tl.load(block).to(tl.float32)
    high = tl.load(block + HALF).to(tl.float32)
    angle = tl.load(positions + token) * HALF + d
    if head < HEADS + KV_HEADS:
        c = tl.load(cos + angle)
        s = tl.load(sin + angle)
        turned = low * c - high * s
        high = high * c + low * s
        low = turned
    if head < HEADS:
        tl.store(block, low)
        tl.store(block + HALF, high)
    else:
        slot = tl.load(kv_slots + token)
        kv = head - HEADS  # K's heads, then V's, as in the cache
        row = (slot // BLOCK_TOKENS * 2 * KV_HEADS + kv) * BLOCK_TOKENS + slot % BLOCK_TOKENS
        tl.store(kv_cache + row * 2 * HALF + d, low)
        tl.store(kv_cache + row * 2 * HALF + HALF + d, high)


def _stream() -> torch.cuda.Stream:
    return torch.cuda.Stream()  # type: ignore[no-untyped-call]


class _Weights(NamedTuple):
    qkv: Tensor
    out: Tensor
    gate_up: Tensor
    down: Tensor
    norms: tuple[Tensor, Tensor]


class Model:
    """Owns the base weights and the tensors of a step of `tokens` tokens."""

    def __init__(self, sizes: Sizes, tokens: int, dtype: torch.dtype, device: torch.device) -> None:
        self.sizes, self.tokens = sizes, tokens
        hidden, wide = sizes.hidden, sizes.intermediate

        def matrix(rows: int, columns: int) -> Tensor:
            return torch.empty((rows, columns), dtype=dtype, device=device).normal_(
                std=columns**-0.5
            )

        def tensor(columns: int) -> Tensor:
            return torch.zeros((tokens, columns), dtype=dtype, device=device)

        norm = torch.ones(hidden, dtype=dtype, device=device)
        self._layers = [
            _Weights(
                matrix(hidden + 2 * sizes.kv, hidden),
                matrix(hidden, hidden),
                matrix(2 * wide, hidden),
                matrix(hidden, wide),
                (norm, norm),
            )
            for _ in range(sizes.layers)
        ]
        self._embedded = tensor(hidden).normal_()
        self.x, self._normed, self._added = tensor(hidden), tensor(hidden), tensor(hidden)
        self._qkv, self._gate_up, self._act = (
            tensor(hidden + 2 * sizes.kv),
            tensor(2 * wide),
            tensor(wide),
        )
        angle = torch.outer(torch.arange(4096.0), 1e4 ** -torch.linspace(0, 1, sizes.head_dim // 2))
        self._cos, self._sin = angle.cos().to(device), angle.sin().to(device)
        self._positions = torch.randint(4096, (tokens,), device=device)
        self._kv_slots = torch.randperm(tokens * 4, device=device)[:tokens]
        blocks = triton.cdiv(tokens * 4, BLOCK_TOKENS)
        self._kv_heads = sizes.kv // sizes.head_dim
        self.kv_cache = torch.zeros(
            (blocks, 2, self._kv_heads, BLOCK_TOKENS, sizes.head_dim), dtype=dtype, device=device
        )
        self._squares = torch.zeros((tokens, 1), device=device)
        self._beside = _stream() if device.type == "cuda" else None

    def base(self) -> None:
        """A step without LoRA."""
        self._start()
        self._add_norm(self._layers[0].norms[0], zero=True)
        for index, layer in enumerate(self._layers):
            torch.mm(self._normed, layer.qkv.T, out=self._qkv)
            self._rotary()
            torch.mm(self._attended, layer.out.T, out=self._added)
            self._add_norm(layer.norms[1])
            torch.mm(self._normed, layer.gate_up.T, out=self._gate_up)
            self._silu()
            torch.mm(self._act, layer.down.T, out=self._added)
            self._add_norm(self._norm_after(index))

    def lora(self, design: Design, lora: TritonLora, step: Step) -> None:
        """A step with LoRA; its tiles must cover all tokens."""
        self._start()
        self._add_norm(self._layers[0].norms[0], zero=True)
        tables = step.prepare()
        run = _Run(self, design, lora, tables)
        shrunk = False
        for index in range(len(self._layers)):
            shrunk = run.layer(index, shrunk)

    @property
    def _attended(self) -> Tensor:
        return self._qkv[:, : self.sizes.hidden]

    def _start(self) -> None:
        self.x.copy_(self._embedded)

    def _norm_after(self, index: int) -> Tensor:
        return self._layers[min(index + 1, len(self._layers) - 1)].norms[0]

    def _add_norm(self, weight: Tensor, *, zero: bool = False) -> None:
        if zero:
            self._added.zero_()
        hidden = self.sizes.hidden
        add_norm_kernel[(self.tokens,)](
            self.x, self._added, weight, self._normed, EPS, N=hidden,
            BLOCK=triton.next_power_of_2(hidden), num_warps=8,
        )  # fmt: skip

    def _silu(self) -> None:
        wide = self.sizes.intermediate
        grid = (self.tokens, triton.cdiv(wide, 1024))
        silu_kernel[grid](self._gate_up, self._act, N=wide, BLOCK=1024)

    def _rotary(self) -> None:
        heads = self.sizes.hidden // self.sizes.head_dim
        rotary_kernel[(self.tokens, heads + 2 * self._kv_heads)](
            self._qkv, self._cos, self._sin, self._positions, self._kv_slots, self.kv_cache,
            HEADS=heads, KV_HEADS=self._kv_heads, HALF=self.sizes.head_dim // 2,
            BLOCK_TOKENS=BLOCK_TOKENS, num_warps=1,
        )  # fmt: skip


class _Run:
    """The layers of one step, by a design."""

    def __init__(self, model: Model, design: Design, lora: TritonLora, tables: StepTables) -> None:
        self._model, self._design, self._lora, self._tables = model, design, lora, tables
        parts = lora.square_parts(OUT)
        if model._squares.shape[1] != parts:
            model._squares = torch.zeros((model.tokens, parts), device=model.x.device)

    def layer(self, index: int, shrunk: bool) -> bool:
        """shrunk: the h of q, k, v is there. Returns this for the next layer."""
        model, design, lora, tables = self._model, self._design, self._lora, self._tables
        weights = model._layers[index]
        self._linear(model._normed, weights.qkv, model._qkv, index, QKV, shrunk)
        if design.rotary:
            lora.expand_rotary(
                model._qkv, model._cos, model._sin, model._positions, model._kv_slots,
                model.kv_cache, tables, index,
            )  # fmt: skip
        else:
            lora.expand(model._qkv, tables, index, QKV)
            model._rotary()
        self._linear(model._attended, weights.out, model._added, index, OUT, False)
        shrunk = self._after(OUT, index, weights.norms[1], index, GATE_UP)
        self._linear(model._normed, weights.gate_up, model._gate_up, index, GATE_UP, shrunk)
        if design.silu:
            lora.expand_silu(model._gate_up, model._act, tables, index)
        else:
            lora.expand(model._gate_up, tables, index, GATE_UP)
            model._silu()
        self._linear(model._act, weights.down, model._added, index, DOWN, False)
        following = min(index + 1, len(model._layers) - 1)
        return self._after(DOWN, index, model._norm_after(index), following, QKV)

    def _linear(
        self, x: Tensor, weight: Tensor, y: Tensor, layer: int, group: int, shrunk: bool
    ) -> None:
        beside = self._model._beside if self._design.beside and not shrunk else None
        if beside is not None:
            beside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(beside):
                self._lora.shrink(x, self._tables, layer, group)
        elif not shrunk:
            self._lora.shrink(x, self._tables, layer, group)
        torch.mm(x, weight.T, out=y)
        if beside is not None:
            torch.cuda.current_stream().wait_stream(beside)

    def _after(
        self, group: int, layer: int, norm: Tensor, next_layer: int, next_group: int
    ) -> bool:
        """What stands between o or down and the next norm's end."""
        model, lora, tables = self._model, self._lora, self._tables
        if not self._design.residual:
            lora.expand(model._added, tables, layer, group)
            model._add_norm(norm)
            return False
        lora.expand_residual(model._added, model.x, model._squares, tables, layer, group)
        lora.norm_shrink(
            model.x, model._normed, norm, model._squares, EPS, tables, next_layer, next_group
        )
        return True
