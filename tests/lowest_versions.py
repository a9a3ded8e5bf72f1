"""Print the lowest version of each dependency that pyproject.toml allows: for `make test-lowest`.

torch and torchvision are left out: another one is a download of gigabytes.
"""

from importlib.metadata import requires

from packaging.requirements import Requirement

EXTRAS = ("", "onnx", "sweep", "tensorboard")
LEFT_OUT = ("torch", "torchvision", "lightning-compress")
# Of matplotlib 3.8, for which a newer one has deprecated what it uses.
THEIRS = ["pyparsing==3.1.0"]


def lowest(requirement: Requirement) -> str:
    """`name==version` of the requirement's lower bound."""
    (bound,) = (one.version for one in requirement.specifier if one.operator in (">=", "=="))
    return f"{requirement.name}=={bound}"


def main() -> None:
    """A line each, of those that this Python has."""
    found = [
        one
        for one in map(Requirement, requires("lightning-compress") or [])
        if one.marker is None or any(one.marker.evaluate({"extra": extra}) for extra in EXTRAS)
    ]
    print("\n".join([*(lowest(one) for one in found if one.name not in LEFT_OUT), *THEIRS]))


if __name__ == "__main__":
    main()
