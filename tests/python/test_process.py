"""A process around the operator: it forks, it ends, it has a floating-point environment."""

import subprocess
import sys
import textwrap

BEGIN = """
import multiprocessing, os, sys, threading, time
import torch
import blasst

torch.manual_seed(0)
q, k, v = (torch.randn(1, 600, heads, 64) for heads in (4, 2, 2))


def attention(_=None):
    return blasst.attention(q, k, v, causal=True, threshold=0.01)


wanted = attention()


def same(_=None):
    return torch.equal(attention(), wanted)


def status_of(child):
    sys.stdout.flush()
    process = os.fork()
    if process == 0:
        child()
        os._exit(125)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
"""


def run(body):
    """Runs the script; one that hangs fails."""
    # Without torch.set_num_threads: the threads it makes are joined in forked children, too, which
    # hangs or crashes them.
    script = BEGIN + textwrap.dedent(body)
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_a_forked_child_that_uses_the_operator_ends():
    run(
        """
        assert status_of(lambda: sys.exit(7)) == 7
        assert status_of(lambda: sys.exit(7 if same() else 8)) == 7
        assert same()
        """
    )


def test_a_pool_of_forked_processes():
    run(
        """
        with multiprocessing.get_context("fork").Pool(2) as pool:
            assert all(pool.map(same, range(4)))
        """
    )


def test_a_fork_while_another_thread_is_inside_the_operator():
    run(
        """
        stop = False


        def busy():
            while not stop:
                attention()


        thread = threading.Thread(target=busy)
        thread.start()
        statuses = [status_of(lambda: os._exit(7 if same() else 8)) for _ in range(10)]
        stop = True
        thread.join()
        assert statuses == [7] * 10, statuses
        """
    )


def test_subnormals_stay_where_torch_flushes_them():
    run(
        """
        v *= 1e-39
        wanted = attention().view(torch.int32)
        assert ((wanted != 0) & (wanted & 0x7F800000 == 0)).any(), "nothing to flush"
        if torch.set_flush_denormal(True):
            assert torch.equal(attention().view(torch.int32), wanted)
        """
    )
