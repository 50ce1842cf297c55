"""Gather the wheels that `gpu.sh` installs on a machine without a network

    .venv/bin/python benchmarks/gpu_wheels.py

Run it in the environment that `make install` creates: the wheels are what the package requires, in the versions installed
here, for the Python and platform named below. Left out, with whatever only they require, are large packages that such a
machine has anyway (torch, numpy, pandas, pyarrow, matplotlib) and those that only notebooks or downloads use; `--without`
names others.

    python3 benchmarks/gpu_wheels.py --lacking

prints the wheels of the folder that the Python running it lacks, or has in an older version.
"""
import argparse
import configparser
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name, parse_wheel_filename
from packaging.version import Version

HERE = Path(__file__).resolve().parent
PYTHON = "3.12"
PLATFORMS = ["manylinux1", "manylinux2010", "manylinux2014", *(f"manylinux_2_{n}" for n in range(5, 40)), "linux"]
WITHOUT = ["torch", "numpy", "pandas", "pyarrow", "matplotlib", "ipywidgets", "hf-xet"]


def wanted(requirement, extra=""):
    "Does the machine's Python need this requirement?"
    there = {"python_version": PYTHON, "python_full_version": f"{PYTHON}.0", "sys_platform": "linux", "platform_system": "Linux",
             "platform_machine": "x86_64", "implementation_name": "cpython", "extra": extra}
    return requirement.marker is None or requirement.marker.evaluate(there)


def closure(without):
    "Name -> version here, of all that the package requires"
    config = configparser.ConfigParser()
    config.read(HERE.parent/"settings.ini")
    todo, found = [Requirement(r) for r in config["DEFAULT"]["requirements"].split()], {}
    while todo:
        requirement = todo.pop()
        name = canonicalize_name(requirement.name)
        if name in without: continue
        found.setdefault(name, (version(name), set()))
        for extra in {"", *requirement.extras} - found[name][1]:
            found[name][1].add(extra)
            todo += [r for r in map(Requirement, requires(name) or []) if wanted(r, extra)]
    return {name: v for name, (v, _) in sorted(found.items())}


def gather(folder, without):
    "Download the wheels into `folder`, and remove all others from it"
    pins = closure({canonicalize_name(n) for n in without})
    platforms = [option for p in PLATFORMS for option in ("--platform", f"{p}_x86_64")]
    subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "--python-version", PYTHON,
                    "--implementation", "cp", *platforms, "-d", folder, *(f"{n}=={v}" for n, v in pins.items())], check=True)
    for wheel in folder.glob("*.whl"):
        name, found = parse_wheel_filename(wheel.name)[:2]
        if name not in pins or found != Version(pins[name]): wheel.unlink()
    wheels = list(folder.glob("*.whl"))
    print(f"{len(wheels)} wheels in {folder}, {sum(w.stat().st_size for w in wheels) / 2**20:.1f} MiB")


def lacking(folder):
    "The wheels that are not installed here in the same or a newer version"
    for wheel in sorted(folder.glob("*.whl")):
        name, offered = parse_wheel_filename(wheel.name)[:2]
        try: enough = Version(version(name)) >= offered
        except PackageNotFoundError: enough = False
        if not enough: yield wheel


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=HERE/"wheels", help="folder of the wheels; default benchmarks/wheels")
    parser.add_argument("--without", nargs="*", default=WITHOUT, help=f"packages to leave out; default {' '.join(WITHOUT)}")
    parser.add_argument("--lacking", action="store_true", help="print what is lacking here instead")
    args = parser.parse_args()
    if not args.lacking: return gather(args.folder, args.without)
    for wheel in lacking(args.folder): print(wheel)


if __name__ == "__main__": main()
