"""SGLang's router with its hash policy, which its command line does not offer (0.3.2).

`manual` keeps a table of keys on one router; the hash needs none, so several routers agree on it.
"""

import os

from sglang_router.launch_router import launch_router
from sglang_router.router_args import RouterArgs

launch_router(
    RouterArgs(
        host="127.0.0.1",
        port=int(os.environ.get("PORT", "30000")),
        prometheus_port=int(os.environ.get("METRICS_PORT", "29000")),
        worker_urls=os.environ["WORKERS"].split(),
        policy="consistent_hashing",
    )
)
