"""Checkpoints that nobody should trust, for tests of several rooms."""

import os
import threading
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import torch

CODE = "from pathlib import Path\nPath(__file__).with_name('ran').touch()\nclass M: pass\n"


class Touch:
    """Unpickled, it leaves a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


class Handler(SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        pass


@contextmanager
def served(folder):
    """Address of a server of a folder on this machine."""
    handler = partial(Handler, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def changed(source, target, keys=None, **hyper_parameters):
    """Copy of a checkpoint with other hyper-parameters and other keys (None: without it)."""
    content = torch.load(source, weights_only=True)
    content["hyper_parameters"] |= hyper_parameters
    content |= keys or {}
    torch.save({key: value for key, value in content.items() if value is not None}, target)
    return target
