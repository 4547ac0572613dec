"""A cache of teacher signals: run the teacher once (``kd cache``), distil from what it said (``use = "cached"``).

``Cache`` reads one; ``kdcore.cache`` writes one. See docs/cache.md.
"""

from kdcore.caching.codec import TopKCodec as TopKCodec
from kdcore.caching.codec import log_error as log_error
from kdcore.caching.reader import Cache as Cache
from kdcore.caching.writer import write as write
