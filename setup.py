"""Packages and version ranges, which scripts/check_env.py reads too. requirements.txt has the exact versions
tested.

A lower bound is the oldest version that was run (docs/versions.md). An upper bound is the next major version,
or the first minor version that was not run where the major one is 0 or minor ones have broken us; a comment
names a reason of its own.
"""

import re
from pathlib import Path

CORE = [
    "torch>=2.6,<2.16",
    "torchvision>=0.21,<0.30",
    # as libra/engine/transformers_api.py: minor versions rename what we call, as 5.24 did the cache
    "transformers>=5.17,<5.25",
    "accelerate>=1.7,<2",
    "numpy>=2.0,<3",
    "pillow>=10.0,<14",
    "pyyaml>=6.0,<7",
    "requests>=2.32,<3",
    "sentencepiece>=0.2,<0.2.3",  # 0.2.3 needs protobuf 7
    "protobuf>=4.25,<7",  # lmms-eval 0.7.1 and later pin wandb 0.25.0, which needs protobuf < 7
    "tqdm>=4.66.3,<5",
]
MINI = ["scikit-learn>=1.5,<2", "easy-vqa>=1.0,<2"]  # the images behind the embedded model and its benchmark
EVAL = [
    "filelock>=3.16,<4",  # lmms-eval 0.7.3 imports filelock._api, which 4 no longer has
    "lmms-eval>=0.7.3,<0.8",  # its task and evaluator modules change between minor versions
    "datasets>=5.0,<6",
    "matplotlib>=3.9,<4",
    *MINI,
]
VIDEO = [
    "timm>=1.0.21,<2",  # VideoLLaMA-2's connector; some towers of transformers' classes need 1.0.21
    "av>=13.0,<16",  # the frames of video files; lmms-eval asks for av < 16
]
LORA = ["peft>=0.21,<0.22"]  # still 0.x: a minor version may change anything
WEB = ["starlette>=1.10,<2", "uvicorn>=0.30,<0.55"]
SERVE = ["fastapi>=0.116,<0.166", "openai>=2.0,<4", "uvicorn>=0.30,<0.55"]
TRAIN = [
    *MINI,
    *LORA,
    'deepspeed>=0.19,<0.20; sys_platform == "linux"',  # 0.x as well, and nothing to install on other systems
    "ninja>=1.11,<2",  # deepspeed builds its CPU communication with it
]
TESTS = ["playwright>=1.45,<2", "pytest>=8.0,<10", "pytest-xdist>=3.5,<4", "hypothesis>=6.100,<7"]
EXTRAS = {
    "eval": EVAL,
    "train": TRAIN,
    "video": VIDEO,
    "lora": LORA,
    "web": WEB,
    # libra/serve/command.py: the classes of transformers' server are no public interface
    "serve": [*SERVE, "transformers>=5.23,<5.24"],
    "flash": ["flash-attn>=2.7,<3"],
    "test": [*EVAL, *VIDEO, *TRAIN, *WEB, *SERVE, *TESTS],
}

# The address of the project's pages. Empty: it has none, and nothing names one. Every link of the metadata
# comes from it.
PROJECT_URL = ""
HERE = Path(__file__).resolve().parent


def version() -> str:
    """``libra.__version__``, read without importing anything."""
    return re.search(
        r'^__version__ = "(.+)"$', (HERE / "libra/__init__.py").read_text(encoding="utf-8"), re.MULTILINE
    )[1]


def readme() -> str:
    """README.md; its links into the repository are absolute where the repository has an address."""
    text = (HERE / "README.md").read_text(encoding="utf-8")
    return re.sub(r"\]\((?!https?:|#)", f"]({PROJECT_URL}/blob/main/", text) if PROJECT_URL else text


if __name__ == "__main__":
    from setuptools import find_packages, setup

    # Rows and the embedded checkpoint lie at the top of the repository and are copied into the package
    # (libra/rows.py).
    shipped = {"libra.configs": "configs", "libra.mini.checkpoint": "mini/checkpoint"}
    setup(
        name="libra-merging",
        version=version(),
        description="Libra-Merging: fewer visual tokens for large vision-language models, with LLaVA and "
        "Hugging Face models",
        long_description=readme(),
        long_description_content_type="text/markdown",
        author="The Libra-Merging contributors",
        url=PROJECT_URL or None,
        project_urls={"Changelog": f"{PROJECT_URL}/blob/main/CHANGELOG.md"} if PROJECT_URL else {},
        license="Apache-2.0",
        license_files=["LICENSE", "NOTICE"],
        keywords="vision-language models, token compression, token merging, token pruning, LLaVA, inference",
        classifiers=[
            "Development Status :: 4 - Beta",
            "Intended Audience :: Science/Research",
            "Operating System :: POSIX :: Linux",
            "Programming Language :: Python :: 3 :: Only",
            "Topic :: Scientific/Engineering :: Artificial Intelligence",
            "Typing :: Typed",
        ],
        python_requires=">=3.11",
        install_requires=CORE,
        extras_require=EXTRAS,
        packages=[*find_packages(include=("libra", "libra.*", "llava", "llava.*")), *shipped],
        package_dir=shipped,
        package_data={
            "libra": ["py.typed", "models.yaml"],
            "libra.latency": ["expected.json"],
            "libra.lmms": ["tasks/*"],
            "llava": ["py.typed"],
            "llava.serve": ["static/*"],
            "libra.configs": ["**/*.yaml"],
            "libra.mini.checkpoint": ["**/*"],
        },
        entry_points={
            "lmms_eval.models": ["libra = libra.lmms.plugin:manifest"],
            "vllm.general_plugins": ["libra = libra.vllm:register"],
        },
    )
