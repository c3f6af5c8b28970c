"""Shared by the tests' small servers on loopback. They stop by themselves: with `serve`, their threads with the process."""

import contextlib
import http.server
import threading


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers; says nothing of them on stderr."""

    def answer(self, status, content, headers):
        self.send_response(status)
        for name, value in {**headers, "Content-Length": len(content)}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD" and status not in (204, 304):
            self.wfile.write(content)

    def log_message(self, *args):
        """Tests read stderr."""


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, client_address):
        """A client that was killed, or has given up, is no news."""


@contextlib.contextmanager
def serve(handler, **values):
    """(url, asked): the server's address and the list of what it is asked. values: attributes of the server."""
    server = Server(("127.0.0.1", 0), handler)
    server.asked, server.lock = [], threading.Lock()
    vars(server).update(values)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", server.asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
