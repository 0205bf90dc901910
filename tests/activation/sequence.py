"""One sequence of steps in this process.

    python -m tests.activation.sequence HOSTS DIR SEED STEP...

HOSTS is "toys", written to DIR, or "real". See test_sequences.
"""

import functools
import importlib
import os
import random
import sys
import threading

from tests.patching import toys

THREADS = 8


class Toys:
    """Two hosts, a patch each."""

    def __init__(self, folder):
        self.hosts = ["toy_a", "toy_b"]
        for host in self.hosts:
            toys.write_host(folder, host)
        sys.path.insert(0, str(folder))
        self.machine = toys.machine_of(*map(toys.ToyPatch, self.hosts))

    def load(self, host):
        importlib.import_module(f"{host}.target")

    def reload(self, host):
        if f"{host}.target" in sys.modules:
            importlib.reload(sys.modules[f"{host}.target"])
            # What holds aliases keeps those of the code before, as without any plugin.
            for other in (f"{host}.early", host):
                importlib.reload(sys.modules[other])

    def anew(self, host):
        toys.forget(host)

    def check(self, rows, wanted):
        for host in self.hosts:
            state = rows[host].state.value
            if f"{host}.target" not in sys.modules:
                assert state == ("armed" if host in wanted else "disabled"), (host, state)
                continue
            assert state == ("applied" if host in wanted else "disabled"), (host, state)
            assert toys.added(host) == {int(host in wanted)}, (host, toys.added(host))


class Real:
    """What is installed, all patches."""

    def __init__(self):
        from glm5_patch.patches import MACHINE
        from tests.activation.fresh import of_this_host

        self.machine = MACHINE
        patches = [patch for patch in MACHINE.patches if of_this_host(patch)]
        self.hosts = sorted({patch.module for patch in patches})
        self.ids = {patch.id: patch.module for patch in patches}
        for host in self.hosts:
            self.load(host)
        self.before = self.attributes()

    def load(self, host):
        importlib.import_module(host)

    def attributes(self):
        found = {}
        for module in list(sys.modules.values()):
            if getattr(module, "__name__", "").split(".")[0] not in ("megatron", "transformers"):
                continue
            for name, value in list(vars(module).items()):
                if name == "__warningregistry__":
                    continue  # Python's own, made where a probe silences a warning
                found[module.__name__, name] = value
                if isinstance(value, type) and value.__module__ == module.__name__:
                    found.update({(value, k): v for k, v in list(vars(value).items())})
        return found

    def check(self, rows, wanted):
        live = {"applied", "not_needed"}
        for id in self.ids:
            assert (rows[id].state.value in live) == (id in wanted), (id, rows[id])
        if wanted:
            return
        now = self.attributes()
        changed = [key for key, value in self.before.items() if now.get(key) is not value]
        assert not changed, changed


def main():
    kind, folder, seed, *steps = sys.argv[1:]
    if kind == "toys":
        from pathlib import Path

        subject = Toys(Path(folder))
        ids = subject.hosts
    else:
        subject = Real()
        ids = list(subject.ids)
    machine, dice = subject.machine, random.Random(seed)
    wanted: set[str] = set()

    def asked():
        off = os.environ.get("GLM5_PATCH") == "0"
        return set() if off else set(ids) - {os.environ.get("GLM5_PATCH_DISABLE", "")}

    def in_threads(*functions):
        barrier = threading.Barrier(THREADS)
        errors = []

        def run(function):
            barrier.wait()
            try:
                function()
            except Exception as error:
                errors.append(error)

        threads = [
            threading.Thread(target=run, args=(functions[n % len(functions)],), daemon=True)
            for n in range(THREADS)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert not errors and not any(thread.is_alive() for thread in threads), errors

    for number, step in enumerate([*steps, "disable"]):
        host = dice.choice(subject.hosts)
        if step == "enable":
            machine.enable()
            wanted = asked()
        elif step == "disable":
            machine.disable()
            wanted = set()
        elif step == "import":
            subject.load(host)
        elif step in ("reload", "anew"):
            getattr(subject, step)(host)
        elif step == "switch":
            os.environ["GLM5_PATCH"] = dice.choice("011")
            os.environ["GLM5_PATCH_DISABLE"] = dice.choice([*ids, ""])
        elif step == "threads":
            last = dice.choice([machine.enable, machine.disable])
            # Every other, loading and asking; the last word is said once they are done.
            in_threads(
                machine.enable,
                machine.disable,
                machine.status,
                functools.partial(subject.load, host),
            )
            in_threads(last, machine.status)
            wanted = asked() if last == machine.enable else set()
        try:
            subject.check(machine.status(), wanted)
        except AssertionError as error:
            raise AssertionError(
                f"step {number}, {step} of {host}, after {steps[:number]}"
            ) from error


if __name__ == "__main__":
    main()
