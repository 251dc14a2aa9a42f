"""Build `autotimm` from settings.ini, the one place for name, version, requirements and extras."""
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
parser = ConfigParser(delimiters=["="])
parser.read(here / "settings.ini", encoding="utf-8")
cfg = parser["DEFAULT"]
package = cfg["lib_path"]
prefix = "extra_"


def expand(extra: str) -> list[str]:
    """Requirements of an extra, with each `@name` replaced by the extra of that name."""
    found = []
    for item in cfg[prefix + extra].split():
        found += expand(item[1:]) if item.startswith("@") else [item]
    return list(dict.fromkeys(found))

# An index of packages shows the text alone, so the pictures are named where it can find them.
pictures = cfg["git_url"].replace("github.com",
                                  "raw.githubusercontent.com") + f"/{cfg['branch']}/nbs/images/"
readme = (here / "README.md").read_text(encoding="utf-8").replace("](nbs/images/", f"]({pictures}")

setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=readme,
    long_description_content_type="text/markdown",
    author=cfg["author"],
    license="Apache-2.0",
    keywords=cfg["keywords"].split(),
    python_requires=f">={cfg['min_python']}",
    packages=find_packages(include=[package, package + ".*"]),
    package_data={package: ["py.typed", "**/*.pyi"]},
    install_requires=cfg["requirements"].split(),
    extras_require={key[len(prefix):]: expand(key[len(prefix):]) for key in cfg
                    if key.startswith(prefix)},
    entry_points={
        "console_scripts": cfg["console_scripts"].split(),
        "nbdev": [f"{cfg['lib_name']}={package}._modidx:d"],
    },
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Image Recognition",
        "Typing :: Typed",
    ],
    zip_safe=False,
)
