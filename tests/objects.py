"""An S3 server on loopback, for tests alone: moto's, one request at a time, so that a conditional
PUT is one step.

moto looks for an object and then writes it; answered on threads, two creators of one name might
both win. Names ask for faults: a bucket `forgetful` drops If-None-Match, and the first creation of
an object named *collided* answers 409. Reading an object named *denied* answers 403, of one named
*broken* 500, and of one named *slow* comes after fifteen seconds.
"""

import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

BUCKETS = ("bucket", "forgetful")
KEYS = {"AWS_ACCESS_KEY_ID": "tests", "AWS_SECRET_ACCESS_KEY": "tests", "AWS_REGION": "us-east-1"}


@contextmanager
def served() -> Iterator[dict[str, str]]:
    """The environment that leads to a server with empty buckets, which ends with the block."""
    process = subprocess.Popen(
        [sys.executable, __file__],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=os.environ,
    )
    assert process.stdout is not None
    try:
        url = f"http://127.0.0.1:{int(process.stdout.readline())}"
        for name in BUCKETS:
            urllib.request.urlopen(
                urllib.request.Request(f"{url}/{name}", b"", method="PUT"), timeout=300
            ).close()
        yield KEYS | {"AWS_ENDPOINT_URL": url, "NO_PROXY": "127.0.0.1"}
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def faulty(app: Any) -> Any:
    """A WSGI application with the faults that names ask for."""
    collided = set()

    def answer(environ: dict[str, Any], start_response: Any) -> Any:
        path = Path(environ["PATH_INFO"])
        if path.parts[1:2] == ("forgetful",):
            environ.pop("HTTP_IF_NONE_MATCH", None)
        if "collided" in path.name and "HTTP_IF_NONE_MATCH" in environ and path not in collided:
            collided.add(path)
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            start_response("409 Conflict", [("Content-Length", "0")])
            return [b""]
        if environ["REQUEST_METHOD"] == "GET":
            if "slow" in path.name:
                time.sleep(15)
            for word, status in (("denied", "403 Forbidden"), ("broken", "500 Internal Error")):
                if word in path.name:
                    start_response(status, [("Content-Length", "0")])
                    return [b""]
        return app(environ, start_response)

    return answer


def main() -> None:
    from moto.moto_server.werkzeug_app import (
        DomainDispatcherApplication,
        MotoRequestHandler,
        create_backend_app,
    )
    from werkzeug.serving import make_server

    app = faulty(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, app, request_handler=MotoRequestHandler)
    print(server.server_port, flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
