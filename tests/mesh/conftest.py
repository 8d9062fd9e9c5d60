"""The tests of meshes: JAX with four devices, which XLA makes out of one CPU (see `pytest_configure`)."""

from collections.abc import Callable

import pytest
from libraries import skipping_what_is_missing

from gpt_xp import Backend, get_backend

MESHES = ("data=1", "data=4", "data=2,model=2", "model=4", "model=3")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark all tests of this directory."""
    for item in items:
        if "/mesh/" in item.path.as_posix():
            item.add_marker(pytest.mark.mesh)


@pytest.fixture(scope="session")
def on_mesh() -> Callable[..., Backend]:
    """Return a function that makes the backend of a mesh."""
    with skipping_what_is_missing("jax"):
        import jax
    assert len(jax.devices()) >= 4, "start these tests with: pytest -m mesh"
    return lambda mesh, **options: get_backend("jax", mesh=mesh, **options)


@pytest.fixture(params=MESHES)
def mesh_backend(request: pytest.FixtureRequest, on_mesh: Callable[..., Backend]) -> Backend:
    """Return the backend of each mesh in turn, in float32."""
    return on_mesh(request.param)
