"""What the processes that `tests.forked` starts have imported already: a run needs it, and it takes seconds."""

import os

import sklearn.datasets  # noqa: F401
import transformers.models.vit.modeling_vit  # noqa: F401

import tests.training.test_trainer  # noqa: F401
import vitft.cli.app
import vitft.evaluation.counts
import vitft.evaluation.evaluation
import vitft.training.trainer  # noqa: F401
from vitft.data.decoder import formats
from vitft.training.cost import throughput

formats()  # Pillow looks for its plugins
os.fsync = lambda handle: None  # as in tests.conftest
throughput.peak_flops = lambda device, precision, seconds: 2e13  # as in tests.conftest
