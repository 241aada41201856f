"""A thin shim over CMakeLists.txt, so that `pip install`, `pip install -e` and `pip wheel` build the native libraries.

`python setup.py build_ext --inplace` rebuilds what changed. KDKERNELS_CMAKE_ARGS goes to CMake: "-DKDKERNELS_CUDA=OFF";
KDKERNELS_BUILD_VARIANT names a build folder of its own for it.
"""

import os
import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def run(*command):
    scripts = sysconfig.get_path("scripts")  # the cmake and ninja of this very environment come first
    environment = {**os.environ, "PATH": scripts + os.pathsep + os.environ.get("PATH", "")}
    if subprocess.run(command, env=environment).returncode != 0:
        sys.exit("the native build failed: " + " ".join(map(str, command)))  # the compiler has said why


class CMakeBuild(build_ext):
    """Builds in build/cmake-<python>[-variant] and installs beside the Python files, of the source or of the wheel."""

    def run(self):
        package = ROOT / "kdkernels" if self.inplace else Path(self.build_lib).resolve() / "kdkernels"
        arguments = shlex.split(os.environ.get("KDKERNELS_CMAKE_ARGS", ""))
        variant = os.environ.get("KDKERNELS_BUILD_VARIANT", "")
        binary = ROOT / "build" / "-".join(filter(None, ["cmake", sys.implementation.cache_tag, variant]))
        configure = ["cmake", "-G", "Ninja", "-S", ROOT, "-B", binary, f"-DPython_EXECUTABLE={sys.executable}"]
        jobs = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL", "2")
        run(*configure, *arguments)
        run("cmake", "--build", binary, "--parallel", jobs)
        run("cmake", "--install", binary, "--prefix", package)


setup(ext_modules=[Extension("kdkernels._native", sources=[])], cmdclass={"build_ext": CMakeBuild})
