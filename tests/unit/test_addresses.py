"""The addresses of a broker, as they stand in a setting."""

import pytest
from pydantic import ValidationError

from leveret.shared.addresses import addresses_in, user_of
from leveret.shared.settings import ServiceSettings

pytestmark = pytest.mark.unit


def test_one_address_is_one_whatever_is_in_its_password() -> None:
    url = "amqp://leveret-api:a,b%2Cc@10.0.0.1:5672/leveret"
    assert addresses_in(url) == (url,)


def test_the_nodes_of_a_cluster_have_an_address_each() -> None:
    urls = "amqp://u:a,b@one/leveret , amqps://u:a,b@two:5671/leveret,amqp://u:a,b@three/leveret"
    assert addresses_in(urls) == (
        "amqp://u:a,b@one/leveret",
        "amqps://u:a,b@two:5671/leveret",
        "amqp://u:a,b@three/leveret",
    )


def test_addresses_of_different_users_are_refused() -> None:
    with pytest.raises(ValueError, match="the same user"):
        addresses_in("amqp://ada:x@one/leveret,amqp://otto:x@two/leveret")


@pytest.mark.parametrize("urls", ["", "  ", "amqp://ada:x@one/leveret,amqp://otto:x@two/leveret"])
def test_settings_refuse_what_is_no_broker(urls: str) -> None:
    with pytest.raises(ValidationError):
        ServiceSettings(amqp_url=urls)


def test_the_user_is_the_brokers_word_for_it() -> None:
    assert user_of("amqp://a%40b:x@one/leveret") == "a@b"
    assert user_of("amqp://one/leveret") == "guest"
    assert ServiceSettings(amqp_url="amqp://u:x@one/v,amqp://u:x@two/v").amqp_user == "u"
