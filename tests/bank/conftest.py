import pytest
from peft import PeftModel

from tests.bank.models import adapted
from uniproj.bank import AdapterBank


@pytest.fixture(scope="module")
def model() -> PeftModel:
    return adapted()


@pytest.fixture
def bank(model: PeftModel, tmp_path) -> AdapterBank:
    return AdapterBank.create(tmp_path / "bank", model)
