"""The machine on toy hosts: threads, switches, faults, and what others put around a patch."""

import functools
import importlib
import sys
import threading
import warnings

import pytest
import wrapt

from glm5_patch.errors import GLM5PatchError
from glm5_patch.patching.patch import Finding
from tests.patching.toys import METHODS, ToyPatch, added, attributes, forget, machine_of, write_host


@pytest.fixture
def host(tmp_path, monkeypatch, request):
    for name in ("GLM5_PATCH", "GLM5_PATCH_DISABLE", "GLM5_PATCH_STRICT"):
        monkeypatch.delenv(name, raising=False)
    name = f"toy_{abs(hash(request.node.name))}"
    write_host(tmp_path, name)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield name
    forget(name)


def target_of(host):
    return importlib.import_module(f"{host}.target")


def in_threads(function, count=8):
    barrier, errors = threading.Barrier(count), []

    def run():
        barrier.wait()
        try:
            function()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=run, daemon=True) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not errors and not any(thread.is_alive() for thread in threads)


def test_aliases_of_half_imported_modules_are_patched_and_put_back(host):
    machine = machine_of(ToyPatch(host))
    machine.enable()
    target_of(host)
    assert added(host) == {1}
    machine.disable()
    assert added(host) == {0} and "added" not in vars(target_of(host))


@pytest.mark.parametrize("loaded", [True, False])
def test_eight_threads_that_enable_at_once_wrap_once(host, loaded):
    machine = machine_of(ToyPatch(host))
    if loaded:
        target_of(host)
        before = attributes(host)
    in_threads(lambda: (machine.enable(), target_of(host)))
    assert added(host) == {1} and machine.row(host).state == "applied"
    in_threads(machine.disable)
    assert added(host) == {0} and machine.row(host).state == "disabled"
    if loaded:
        after = attributes(host)
        assert after.keys() == before.keys()
        assert all(after[key] is value for key, value in before.items())


def test_a_thread_that_asks_gets_the_patched_host_or_waits(host):
    """Also where the patch itself imports, and asks."""
    patch = ToyPatch(host)

    def needed(module):
        machine.status()
        machine.enable()
        importlib.import_module(f"{host}.early")
        return Finding(True, "asked")

    patch.needed = needed
    machine = machine_of(patch)
    target_of(host)

    def enable_and_look():
        machine.enable()
        assert added(host) == {1}

    in_threads(enable_and_look)


@pytest.mark.parametrize("switch", [("GLM5_PATCH", "0"), ("GLM5_PATCH_DISABLE", "{host}")])
def test_a_switch_that_changes_later_is_honoured(host, monkeypatch, switch):
    machine = machine_of(ToyPatch(host))
    target_of(host)
    before = attributes(host)
    machine.enable()
    monkeypatch.setenv(switch[0], switch[1].format(host=host.upper()))
    machine.enable()
    assert attributes(host) == before and machine.row(host).state == "disabled"
    machine.disable()
    monkeypatch.delenv(switch[0])
    machine.enable()
    assert added(host) == {1}
    machine.disable()
    assert attributes(host) == before


@pytest.mark.parametrize("strict", [False, True])
def test_a_patch_that_raises_half_way_leaves_the_host_identical(host, monkeypatch, strict):
    patch = ToyPatch(host)

    def apply(module, seams):
        ToyPatch.apply(patch, module, seams)
        raise OSError("half-way")

    patch.apply = apply
    machine = machine_of(patch)
    target_of(host)
    before = attributes(host)
    if strict:
        monkeypatch.setenv("GLM5_PATCH_STRICT", "1")
        with pytest.raises(GLM5PatchError, match="half-way"):
            machine.enable()
    else:
        with pytest.warns(RuntimeWarning, match="half-way"):
            machine.enable()
    assert attributes(host) == before
    assert machine.row(host).state == "failed" and not machine.status()
    with pytest.raises(GLM5PatchError, match="OSError: half-way"):
        machine.raise_unless_in_place()


def by_functools(function):
    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        return function(*args, **kwargs) + 10

    return wrapper


def by_wrapt(function):
    return wrapt.FunctionWrapper(function, lambda w, instance, args, kwargs: w(*args) + 10)


@pytest.mark.parametrize("around", [by_functools, by_wrapt])
def test_somebody_elses_wrapper_around_ours_stays_and_works(host, around):
    machine = machine_of(ToyPatch(host))
    target = target_of(host)
    machine.enable()
    target.function = theirs = around(target.function)
    target.Thing.method = around(target.Thing.method)
    for _ in range(3):
        machine.enable()
        assert machine.row(host).state == "applied"
        machine.raise_unless_in_place()
        assert (target.function(0), target.Thing().method(0)) == (11, 11)
        machine.disable()
        assert target.function is theirs
        assert (target.function(0), target.Thing().method(0)) == (10, 10)


def in_a_closure(target, function):
    target.function = lambda x: function(x) + 10


def in_a_closure_of_a_closure(target, function):
    in_a_closure(target, function)
    inner = target.function
    target.function = lambda x: inner(x)


def in_a_default(target, function):
    def theirs(x, of=function):
        return of(x) + 10

    target.function = theirs


def in_a_partial(target, function):
    def theirs(of, x):
        return of(x) + 10

    target.function = functools.partial(theirs, function)


def in_a_global(target, function):
    target.kept = function
    exec("def theirs(x): return kept(x) + 10", vars(target))
    target.function = target.theirs


WITHOUT_WRAPS = [in_a_closure, in_a_closure_of_a_closure, in_a_default, in_a_partial, in_a_global]


@pytest.mark.parametrize("around", WITHOUT_WRAPS)
def test_a_wrapper_without_functools_wraps_counts_as_well(host, around):
    machine = machine_of(ToyPatch(host))
    target = target_of(host)
    machine.enable()
    around(target, target.function)
    theirs = target.function
    assert "function was wrapped since" in machine.row(host).reason
    for _ in range(3):
        machine.enable()
        assert machine.row(host).state == "applied"
        machine.raise_unless_in_place()
        assert target.function(0) == 11
        machine.disable()
        assert target.function is theirs and target.function(0) == 10


def in_an_attribute_of_the_class(thing):
    thing.kept = thing.method
    thing.method = lambda self, x: self.kept(x) + 10


def over_the_class(thing):
    method = thing.method
    thing.method = lambda self, x: method(self, x) + 10


@pytest.mark.parametrize("around", [in_an_attribute_of_the_class, over_the_class])
def test_a_method_wrapped_without_functools_wraps_counts_as_well(host, around):
    machine = machine_of(ToyPatch(host))
    target = target_of(host)
    machine.enable()
    around(target.Thing)
    machine.raise_unless_in_place()
    assert machine.row(host).state == "applied" and target.Thing().method(0) == 11


def test_a_wrapper_that_lets_go_of_ours_does_not_count(host):
    machine = machine_of(ToyPatch(host))
    target = target_of(host)
    machine.enable()
    ours = target.function
    target.function = lambda x: 100
    assert ours(0) == 1
    with pytest.raises(GLM5PatchError, match="function was replaced after patching"):
        machine.raise_unless_in_place()


def test_a_wrapper_of_ours_that_a_mock_puts_back_later_does_nothing(host):
    machine = machine_of(ToyPatch(host))
    target = target_of(host)
    original = target.function
    machine.enable()
    ours, target.function = target.function, lambda x: 100
    machine.disable()
    target.function = ours
    assert target.function(0) == 0
    machine.enable()
    assert target.function(0) == 1
    machine.disable()
    assert target.function is original


@pytest.mark.parametrize("finding", [None, Finding(True, "wrong"), Finding(False, "as good")])
def test_a_replaced_seam_is_probed_again(host, finding):
    patch = ToyPatch(host)
    patch.still_right = lambda module: finding
    machine = machine_of(patch)
    target = target_of(host)
    machine.enable()
    target.function = theirs = lambda x: 100
    if finding is not None and not finding.needed:
        assert machine.row(host).state == "not_needed" and "as good" in machine.row(host).reason
        machine.enable()
        machine.raise_unless_in_place()
        assert target.function is theirs
        return
    assert machine.row(host).state == "failed"
    with pytest.raises(GLM5PatchError, match="function was replaced after patching"):
        machine.raise_unless_in_place()
    with pytest.warns(RuntimeWarning, match="was replaced after patching"):
        machine.enable()
    machine.raise_unless_in_place()
    assert target.function(0) == 101
    machine.disable()
    assert target.function is theirs


def test_a_module_loaded_past_the_hook_is_patched_the_moment_anybody_asks(host, monkeypatch):
    machine = machine_of(ToyPatch(host))
    machine.enable()
    with monkeypatch.context() as patched:
        patched.setattr(sys, "meta_path", [f for f in sys.meta_path if hasattr(f, "__name__")])
        target_of(host)
    assert added(host) == {0}
    machine.raise_unless_in_place()
    assert added(host) == {1} and machine.row(host).late


def test_a_host_that_is_imported_anew_is_patched_by_that_import(host):
    machine = machine_of(ToyPatch(host))
    machine.enable()
    for _ in range(3):
        target_of(host)
        assert added(host) == {1}
        forget(host)
    target_of(host)
    machine.disable()
    assert added(host) == {0}


def test_a_reload_is_patched_when_asked_and_old_classes_stay_patched(host):
    machine = machine_of(ToyPatch(host))
    machine.enable()
    target = target_of(host)
    old = target.Thing
    importlib.reload(target)
    machine.status()
    assert target.function(0) == target.Thing().method(0) == old().method(0) == 1
    machine.disable()
    assert target.function(0) == target.Thing().method(0) == old().method(0) == 0


def test_descriptors_stay_what_they_are(host):
    target = target_of(host)
    kinds = {name: type(vars(target.Thing)[name]) for name in METHODS}
    machine = machine_of(ToyPatch(host))
    machine.enable()
    assert {name: type(vars(target.Thing)[name]) for name in METHODS} == kinds
    assert target.Thing.static(0) == target.Thing.of_class(0) == 1
    machine.disable()


def test_a_wrong_switch_is_said_once_and_refused_by_require(host, monkeypatch):
    machine = machine_of(ToyPatch(host))
    monkeypatch.setenv("GLM5_PATCH_DISABLE", f"{host}x")
    with pytest.warns(RuntimeWarning, match=f"names '{host}x'.*did you mean '{host}'"):
        machine.enable()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        machine.enable()
    assert not machine.status() and host in machine.status().problems[0]
    with pytest.raises(GLM5PatchError, match="is not a patch"):
        machine.require()
    monkeypatch.setenv("GLM5_PATCH_STRICT", "1")
    with pytest.raises(ValueError, match="is not a patch"):
        machine.enable()
