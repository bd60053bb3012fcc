"""Random tests have no deadline: the machine is shared."""

import hypothesis

hypothesis.settings.register_profile("shared machine", deadline=None)
hypothesis.settings.load_profile("shared machine")
