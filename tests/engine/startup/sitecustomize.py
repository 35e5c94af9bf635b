"""First on the path of the servers that tests start: their imports make millions of objects that
all stay, and looking for garbage among them takes a fifth of the time that a start takes."""

import gc

gc.set_threshold(100_000)
