"""The pytest plugin: a fixture, a marker and options that search for rows whose bits change.

It is loaded wherever bicompile is installed, so it imports PyTorch where a test uses it, not
before.  See docs/testing.md.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import pytest

NAME = "batch_invariant"
PROFILES = ("dev", "ci", "soak")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Declare the options."""
    group = parser.getgroup("bicompile", "batch invariance")
    group.addoption(
        "--batch-invariant-device",
        metavar="DEVICE",
        help="move modules and inputs there, e.g. cuda (default: they stay where they are)",
    )
    group.addoption(
        "--batch-invariant-profile",
        choices=PROFILES,
        default="ci",
        help="how many cases are tried: a quarter, the usual number, or 25 times as many",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Declare the marker."""
    config.addinivalue_line(
        "markers",
        f"{NAME}(*properties, **options): what the fixture of that name searches; each property "
        "becomes a test of its own, options are those of assert_batch_invariant",
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Make a test of each property that the marker names."""
    mark = metafunc.definition.get_closest_marker(NAME)
    if mark is not None and mark.args and NAME in metafunc.fixturenames:
        metafunc.parametrize(NAME, mark.args, indirect=True)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Refuse a marker that nothing reads."""
    if item.get_closest_marker(NAME) and NAME not in getattr(item, "fixturenames", ()):
        pytest.fail(
            f"the marker {NAME} is for tests that call the fixture of that name:\n"
            f"  def {item.name}({NAME}):\n      {NAME}(model, make_inputs)",
            pytrace=False,
        )


@pytest.fixture
def batch_invariant(request: pytest.FixtureRequest) -> Callable[..., None]:
    """`bicompile.testing.assert_batch_invariant`, as the marker and the command line set it.

    Arguments of a call come before those of the marker, and those of a test's own marker before
    those of its class or module.

    Example:
        >>> @pytest.mark.batch_invariant("batch size", "neighbours", backend="inductor")
        ... def test_mlp(batch_invariant):
        ...     batch_invariant(model, make_inputs)
    """
    options: dict[str, Any] = {"profile": request.config.getoption("batch_invariant_profile")}
    for mark in reversed(list(request.node.iter_markers(NAME))):
        options |= mark.kwargs
    if hasattr(request, "param"):
        options["properties"] = [request.param]
    device = request.config.getoption("batch_invariant_device")

    def check(
        function: Callable[..., Any], make_inputs: Callable[..., Mapping[str, Any]], **more: Any
    ) -> None:
        from bicompile.testing import assert_batch_invariant

        if device is not None:
            function, make_inputs = _on(device, function, make_inputs)
        assert_batch_invariant(function, make_inputs, **{**options, **more})

    return check


def _on(
    device: str, function: Callable[..., Any], make_inputs: Callable[..., Mapping[str, Any]]
) -> tuple[Callable[..., Any], Callable[..., Mapping[str, Any]]]:
    """A module and what makes its inputs, on a device."""
    import torch
    from torch.utils._pytree import tree_map

    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError(f"--batch-invariant-device={device}: PyTorch sees no NVIDIA GPU")

    @functools.wraps(make_inputs)
    def made(*args: Any, **kwargs: Any) -> Any:
        inputs = make_inputs(*args, **kwargs)
        return tree_map(lambda t: t.to(device) if isinstance(t, torch.Tensor) else t, inputs)

    return function.to(device) if isinstance(function, torch.nn.Module) else function, made
