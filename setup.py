"""Packages and version ranges, which scripts/check_env.py reads too. requirements.txt has the exact versions tested."""

from pathlib import Path

CORE = [
    "torch>=2.6",
    "torchvision>=0.21",
    "transformers>=5.17",
    "accelerate>=1.7",
    "numpy>=1.26",
    "pillow>=10.0",
    "pyyaml>=6.0",
    "requests>=2.32",
    "sentencepiece>=0.2,<0.2.3",  # 0.2.3 needs protobuf 7
    "protobuf>=4.25",
    "tqdm>=4.66.3",
]
MINI = ["scikit-learn>=1.4", "easy-vqa>=1.0"]  # the images behind the embedded model and its benchmark
EVAL = ["lmms-eval>=0.7.3", "datasets>=3.0", "matplotlib>=3.8", *MINI]
VIDEO = ["timm>=1.0", "av>=12.0"]  # VideoLLaMA-2's connector, and the frames of video files
LORA = ["peft>=0.17"]
WEB = ["gradio>=5.0"]
TRAIN = [*MINI, *LORA, "deepspeed>=0.16", "ninja>=1.11"]
EXTRAS = {
    "eval": EVAL,
    "train": TRAIN,
    "video": VIDEO,
    "lora": LORA,
    "web": WEB,
    "flash": ["flash-attn>=2.7"],
    "test": [*EVAL, *VIDEO, *TRAIN, *WEB, "playwright>=1.45", "pytest>=8.0", "pytest-xdist>=3.5", "hypothesis>=6.100"],
}

if __name__ == "__main__":
    from setuptools import find_packages, setup

    setup(
        name="libra-merging",
        version="0.1.0",
        description="Libra-Merging: fewer visual tokens for large vision-language models, with LLaVA and Hugging Face models",
        long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
        long_description_content_type="text/markdown",
        author="The Libra-Merging contributors",
        license="Apache-2.0",
        license_files=["LICENSE", "NOTICE"],
        python_requires=">=3.10",
        install_requires=CORE,
        extras_require=EXTRAS,
        packages=find_packages(include=[f"{name}{rest}" for name in ("libra", "llava", "eval", "mini") for rest in ("", ".*")]),
        package_data={
            "": ["*.yaml"], "libra.latency": ["expected.json"], "libra.lmms": ["tasks/*"], "mini": ["checkpoint/**"],
        },
        entry_points={"lmms_eval.models": ["libra = libra.lmms.plugin:manifest"]},
    )
