"""A small server on loopback that speaks the OpenAI protocol: it rewrites by rule, judges, and fails on demand.

It stops by itself: with the `with` block, and its threads with the process.
"""

import contextlib
import http.server
import json
import re
import threading


def rewrite(text):
    """The sentences in reverse order, with some other words: every number and most words stay."""
    sentences = re.findall(r"[^.]+\.", text.replace("\n", " ")) or [text]
    return " ".join(sentence.strip().replace(" the ", " this ") + " Indeed so." for sentence in reversed(sentences))


def between(tag, text):
    match = re.search(rf"<{tag}>\n(.*?)\n</{tag}>", text, re.DOTALL)
    return match and match[1]


class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        asked = self.server.asked
        with self.server.lock:
            asked.append({**body, "key": self.headers.get("Authorization"), "path": self.path})
            number = len(asked)
        reply = self.server.reply(number, body)
        if isinstance(reply, tuple):
            status, text, headers = reply
            self.answer(status, text.encode(), headers)
        elif reply is not None:
            choice = {"message": {"content": reply}, "finish_reason": "stop"}
            self.answer(200, json.dumps({"choices": [choice]}).encode(), {})

    def answer(self, status, content, headers):
        self.send_response(status)
        for name, value in {**headers, "Content-Length": len(content)}.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args):
        pass


def usual(number, body):
    """Rewrites, and finds every rewrite faithful but one that speaks of dragons."""
    user = body["messages"][-1]["content"]
    if between("rewrite", user) is not None:
        return json.dumps({"faithful": "dragon" not in user})
    return rewrite(between("text", user))


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, client_address):
        """A client that was killed, or has given up, is no news."""


@contextlib.contextmanager
def serve(reply=usual):
    """(url, asked): the server's address and the list of what it is asked."""
    server = Server(("127.0.0.1", 0), Handler)
    server.reply, server.asked, server.lock = reply, [], threading.Lock()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", server.asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def slow(seconds):
    def reply(number, body):
        threading.Event().wait(seconds)
        return usual(number, body)

    return reply
