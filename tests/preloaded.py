"""What the processes that `tests.forked` starts have imported already: a run needs it, and it takes seconds."""

import sklearn.datasets  # noqa: F401
import transformers.models.vit.modeling_vit  # noqa: F401

import tests.test_trainer  # noqa: F401
import vitft.classification
import vitft.cli
import vitft.commands
import vitft.evaluation
import vitft.trainer  # noqa: F401
from vitft import speed
from vitft.data.images import formats

formats()  # Pillow looks for its plugins
speed.peak_flops = lambda device, precision, seconds: 1e12  # as in tests.conftest
