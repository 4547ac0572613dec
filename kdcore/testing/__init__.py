"""The contract, executable: conformance of plugins and oracles of losses. Also for plugins outside this project."""

from .findings import Finding as Finding
from .oracle import Oracle as Oracle
from .oracle import Seeded as Seeded
from .oracle import check_oracle as check_oracle
from .plugin import check_plugin as check_plugin
from .plugin import parametrize as parametrize
