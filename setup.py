"""The one part of the build that setup.cfg cannot express: files of the top level that travel inside the package."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

SHIPPED = ("conf", "constraints.txt", "examples/nemo_aligner", "examples/tiny_chain/made")
"""Copied below `echorl_nemo/` of a wheel, where `echorl_nemo.shipped` finds them. MANIFEST.in has them for an sdist."""


class BuildWithShippedFiles(build_py):
    """Copies `SHIPPED` into the package, unless the installation is editable and reads them where they are."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        for name in SHIPPED:
            source, target = Path(name), Path(self.build_lib, "echorl_nemo", name)
            if source.is_dir():
                shutil.rmtree(target, ignore_errors=True)  # what an earlier build left
                shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copyfile(source, target)


setup(cmdclass={"build_py": BuildWithShippedFiles})
