"""What all tests share."""

from hypothesis import settings

# Other work on the machine is no fault of the code's.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")
