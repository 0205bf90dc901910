"""Make the cards of docs/cards: what ``glm5-patch verify`` finds with each host.

    python -m tests.hosts.cards [--megatron-lm] INTERPRETER=HOST[,HOST...] ...

INTERPRETER and HOST are as in ``tests.hosts.matrix``. With --megatron-lm each HOST is a
megatron-core, and ``MEGATRON_LM`` names Megatron-LM's source tree of that release.
"""

from __future__ import annotations

import argparse
import sys

from tests.hosts import tables
from tests.hosts.matrix import Host, HostFailed, hosts_of, on_each

JUDGED = "tests/clients/judged"
_CLIENT = ("--allow", "latent_norm_eps")
"""Clients take rms_norm_eps for the latent norms, as the serving engines do."""
MODELS = {
    "megatron-core": (),
    "transformers": ("--model", "transformers:GlmMoeDsaForCausalLM"),
    "megatron-bridge": ("--model", f"{JUDGED}/bridge.py:with_the_plugin", *_CLIENT),
    "mcore-bridge": ("--model", f"{JUDGED}/mcore_bridge.py:built", *_CLIENT),
}
"""Package -> arguments of ``verify``."""
MEGATRON_LM = ("--model", f"{JUDGED}/megatron_lm.py:by_config", *_CLIENT)


def make(host: Host) -> dict:
    return _make(host, host.requirement, MODELS[host.package])


def make_for_megatron_lm(host: Host) -> dict:
    return _make(host, f"megatron-lm=={host.release}", MEGATRON_LM)


def _make(host: Host, name: str, arguments: tuple[str, ...]) -> dict:
    path = tables.CARDS / f"{name.replace('==', '-').replace('+', '_')}.yaml"
    path.unlink(missing_ok=True)
    shown = str(path.relative_to(tables.ROOT))
    result = host.run("-W", "ignore", "-m", "glm5_patch", "verify", *arguments, "--card", shown)
    if not path.exists():
        raise HostFailed(result.stderr[-2000:])
    return {"exit code": result.returncode}


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--megatron-lm", action="store_true")
    parser.add_argument("hosts", nargs="+", metavar="INTERPRETER=PACKAGE==RELEASE,...")
    options = parser.parse_args()
    action = make_for_megatron_lm if options.megatron_lm else make
    found = on_each(hosts_of(options.hosts), action)
    tables.write(tables.read())
    return int(any("failed" in one for one in found.values()))


if __name__ == "__main__":
    sys.exit(main())
