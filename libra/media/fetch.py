"""Downloads that end: limits on the bytes and on the whole time, and no way into private networks where that
is forbidden."""

import ipaddress
import socket
import threading
import time
from urllib.parse import urlsplit

import requests
from requests.adapters import HTTPAdapter
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool

CONNECT_SECONDS = 10
REDIRECTS = 5
_CHUNK = 65536
_PRIVATE = "it lies on this machine or in a private network"
_NAT64 = ipaddress.ip_network(
    "64:ff9b::/96"
)  # IPv4 addresses, the last four bytes, as seen from an IPv6 network


def fetch(url: str, limit: int, seconds: float, public_only: bool = False) -> bytes:
    """The body that an http(s) address answers with.

    Args:
        limit: how many bytes it may have; it is read as it was sent and never unpacked.
        seconds: for all of it, redirects included, however slowly it comes.
        public_only: refuse addresses of this machine and of private networks, also as the target of a
            redirect. What counts is the address that the connection was made to, so a name that changes its
            meaning does not help. Proxies are not used then.

    Raises:
        ValueError: why there is no body, in a few words that go on from "cannot be fetched: ".
    """
    if urlsplit(url).scheme.lower() not in ("http", "https"):
        raise ValueError("it is not an http or https address")
    guard = _Guard(seconds, public_only)
    session = requests.Session()
    session.max_redirects, session.trust_env = REDIRECTS, not public_only
    for scheme in ("http://", "https://"):
        session.mount(scheme, _GuardedAdapter(guard))
    try:
        with (
            session,
            guard,
            session.get(
                url,
                stream=True,
                timeout=(min(CONNECT_SECONDS, seconds), seconds),
                headers={"Accept-Encoding": "identity"},
            ) as response,
        ):
            return _body(response, limit, guard)
    except (requests.RequestException, OSError, ValueError) as error:
        raise ValueError(guard.refusal or _in_words(error)) from error


def _body(response: requests.Response, limit: int, guard: "_Guard") -> bytes:
    if not response.ok:
        raise ValueError(f"the server answers {response.status_code} {response.reason or ''}".rstrip())
    if response.headers.get("Content-Encoding", "identity") != "identity":
        raise ValueError(f"the server sends it packed ({response.headers['Content-Encoding']})")
    if (response.raw.length_remaining or 0) > limit:  # None where the header is missing or not a number
        raise ValueError(f"it has more than {limit:,} bytes")
    body = bytearray()
    while chunk := response.raw.read(_CHUNK):
        body += chunk
        if len(body) > limit:
            raise ValueError(f"it has more than {limit:,} bytes")
    if guard.refusal:  # the connection was shut, which looks like the end of the body
        raise ValueError(guard.refusal)
    return bytes(body)


def _in_words(error: Exception) -> str:
    """The libraries' messages repeat the address and their own classes."""
    if isinstance(error, requests.Timeout):
        return "there is no answer in time"
    if isinstance(error, requests.TooManyRedirects):
        return f"it redirects more than {REDIRECTS} times"
    if isinstance(error, (requests.exceptions.InvalidURL, requests.exceptions.InvalidSchema)):
        return "the address, or one that it redirects to, is not valid"
    if isinstance(error, requests.exceptions.SSLError):
        return "the server's certificate is not valid"
    if isinstance(error, requests.RequestException) or not isinstance(error, ValueError):
        return "there is no connection, or it broke off"
    return str(error)


class _Guard:
    """Shuts the connections when the time is over, and refuses private addresses.

    A timeout of the sockets would not do: it begins anew with every byte.
    """

    def __init__(self, seconds: float, public_only: bool):
        self.seconds, self.public_only, self.refusal = seconds, public_only, ""
        self._end = time.monotonic() + seconds
        self._watched: list[socket.socket] = []
        self._lock = threading.Lock()
        self._timer = threading.Timer(seconds, self._shut)
        self._timer.daemon = True

    def __enter__(self):
        self._timer.start()

    def __exit__(self, *_):
        self._timer.cancel()
        with self._lock:
            for watched in self._watched:
                watched.close()
            self._watched.clear()

    def admit(self, host: str, port: int) -> None:
        """Called with each name before it is connected to. Raises OSError for one of the private network."""
        if self.public_only and not all(
            is_public(str(info[4][0])) for info in socket.getaddrinfo(host, port)
        ):
            self.refusal = _PRIVATE
            raise OSError(self.refusal)

    def watch(self, connected: socket.socket) -> socket.socket:
        """Called with each connection before anything is sent on it. Raises OSError for one that may not
        be."""
        if self.public_only and not is_public(connected.getpeername()[0]):
            self.refusal = _PRIVATE  # the name has changed its meaning in the meantime
        elif time.monotonic() >= self._end:
            self._shut()
        if self.refusal:
            connected.close()
            raise OSError(self.refusal)
        with self._lock:
            self._watched.append(connected.dup())  # TLS takes the socket itself over
        return connected

    def _shut(self) -> None:
        self.refusal = f"it takes longer than {self.seconds:g} seconds"
        with self._lock:
            for watched in self._watched:
                try:
                    watched.shutdown(socket.SHUT_RDWR)
                except OSError:  # closed by the other side
                    pass


def is_public(address: str) -> bool:
    """Whether an IP address is one of the public internet."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if ip.version == 6 and ip in _NAT64:
        ip = ipaddress.IPv4Address(ip.packed[-4:])
    ip = getattr(ip, "ipv4_mapped", None) or ip
    return ip.is_global and not ip.is_multicast


class _GuardedAdapter(HTTPAdapter):
    """Connections that the guard sees as soon as they are made, the proxies' too."""

    def __init__(self, guard: _Guard):
        self._pools = _pools(guard)
        super().__init__()

    def init_poolmanager(self, *args, **kwargs):
        super().init_poolmanager(*args, **kwargs)
        self.poolmanager.pool_classes_by_scheme = self._pools

    def proxy_manager_for(self, proxy, **kwargs):
        manager = super().proxy_manager_for(proxy, **kwargs)
        if not proxy.lower().startswith("socks"):
            manager.pool_classes_by_scheme = self._pools
        return manager


def _pools(guard: _Guard) -> dict[str, type]:
    class Guarded:
        host: str
        port: int

        def _new_conn(self):
            guard.admit(self.host, self.port)
            return guard.watch(super()._new_conn())  # type: ignore[misc]  # of the class next to it

    class Plain(Guarded, HTTPConnection):
        pass

    class Secure(Guarded, HTTPSConnection):
        pass

    class PlainPool(HTTPConnectionPool):
        ConnectionCls = Plain

    class SecurePool(HTTPSConnectionPool):
        ConnectionCls = Secure

    return {"http": PlainPool, "https": SecurePool}
