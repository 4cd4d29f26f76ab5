import pytest
from release_cases import SOURCES


@pytest.fixture(params=SOURCES)
def source(request):
    """A folder of recorded cases: what is shipped and, where it lies, everything."""
    return SOURCES[request.param]
