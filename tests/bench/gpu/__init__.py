"""The first minutes on a GPU: is it right, is it as fast as expected, and what to do if not.

    python -m tests.bench.gpu                            what fits in 7 minutes
    python -m tests.bench.gpu --quick                    the most telling checks, 2 minutes
    python -m tests.bench.gpu --only decode,step         some checks
    python -m tests.bench.gpu --device cpu --tiny        the checks' code, without a GPU

Each check prints its figures at once, as lines `RESULT gpu.NAME=VALUE expected=RANGE`. One that
fails, hangs or ends the process does not stop the next. A table of what passed, was slower than
expected or wrong, failed or was skipped comes last. Exit status: 1 if something was wrong or
failed, 2 if nothing could run, else 0. tests/bench/README.md says what each check means, and what
to do when it fails.

Runs from a plain checkout, with torch >= 2.11 and Python >= 3.11, and without Ray. It needs numpy,
msgpack, pyarrow, safetensors, pyyaml and pydantic. Some checks need more, and are skipped with the
name of what lacks: triton (kernels); tyro, rich, pillow, scipy, huggingface_hub (step, weights,
reproducible, iteration, miniature); pillow and scipy (images, scorers, loo_fid, public);
open_clip_torch with torchvision, timm, ftfy and regex (scorers, public, iteration, miniature);
threadpoolctl (public, iteration, miniature) and tyro (public); scikit-learn (miniature); pytest
(tests; without hypothesis or triton it leaves out files that need them).
Images with PyTorch for GPUs mostly have all but these, which this line, elsewhere, downloads as
wheels for Python 3.12 (the version of pydantic-core is the one that its pydantic asks for):

    pip download -d wheels --no-deps --only-binary=:all: --python-version 3.12 \\
        --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 \\
        --platform manylinux2014_x86_64 \\
        pydantic pydantic-core==VERSION annotated-types typing-inspection typing-extensions \\
        msgpack pyarrow safetensors scipy pytest iniconfig pluggy hypothesis sortedcontainers \\
        threadpoolctl tyro typeguard docstring-parser tenacity open-clip-torch ftfy wcwidth timm

and which this line, in the checkout on that machine, runs with:

    pip install -q --no-index --no-deps --target /tmp/site wheels/*.whl &&
        PYTHONPATH=/tmp/site python -m tests.bench.gpu
"""
