"""Run the command with gloo, which sums over the CPUs of several processes, on loopback only.

By default it listens on the address that the machine's name has.
"""

import functools

from jax._src.lib import _jax

_jax.make_gloo_tcp_collectives = functools.partial(_jax.make_gloo_tcp_collectives, hostname="127.0.0.1")

if __name__ == "__main__":
    from gpt_xp.cli import main

    main()
