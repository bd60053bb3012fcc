"""Which lines of a trace speak of a call that may wait for a disk or a network."""

import pytest

from benchmarks.system_calls import is_harmless


@pytest.mark.parametrize(
    "line",
    [
        'write(7<anon_inode:[eventfd]>, "\\1", 8) = 8',
        "12 epoll_wait(9<anon_inode:[eventpoll]>, [], 256, -1) = 0",
        '12 sendto(17<UNIX-STREAM:[4711->4712]>, "x", 1, 0, NULL, 0) = 1',
        "12 socket(AF_UNIX, SOCK_STREAM|SOCK_CLOEXEC, 0) = 3",
        "futex(0x7f00, FUTEX_WAKE_PRIVATE, 1) = 1",
        "12 <... futex resumed>) = 0",
        "--- SIGALRM {si_signo=SIGALRM} ---",
    ],
)
def test_waiting_for_the_pipeline_is_harmless(line: str) -> None:
    assert is_harmless(line)


@pytest.mark.parametrize(
    "line",
    [
        'read(5</srv/adapters/a/adapter_config.json>, "{", 1) = 1',
        'write(2</var/log/server>, "x", 1) = 1',
        'write(2<pipe:[4711]>, "x", 1) = 1',
        'openat(AT_FDCWD</>, "/etc/hosts", O_RDONLY) = 3',
        '12 sendto(5<TCP:[127.0.0.1:1->127.0.0.1:2]>, "x", 1, 0, NULL, 0) = 1',
        "12 socket(AF_INET, SOCK_STREAM|SOCK_CLOEXEC, IPPROTO_TCP) = 3",
        "12 fsync(5</srv/a>) = 0",
    ],
)
def test_files_pipes_and_the_network_are_not(line: str) -> None:
    assert not is_harmless(line)
