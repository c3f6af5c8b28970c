"""A small server on loopback that speaks the OpenAI protocol: it rewrites by rule, judges, and fails on demand."""

import contextlib
import json
import re
import threading

import loopback


def rewrite(text):
    """The sentences in reverse order, with some other words: every number and most words stay."""
    sentences = re.findall(r"[^.]+\.", text.replace("\n", " ")) or [text]
    return " ".join(sentence.strip().replace(" the ", " this ") + " Indeed so." for sentence in reversed(sentences))


def between(tag, text):
    match = re.search(rf"<{tag}>\n(.*?)\n</{tag}>", text, re.DOTALL)
    return match and match[1]


class Handler(loopback.Handler):
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


def usual(number, body):
    """Rewrites, and finds every rewrite faithful but one that speaks of dragons."""
    user = body["messages"][-1]["content"]
    if between("rewrite", user) is not None:
        return json.dumps({"faithful": "dragon" not in user})
    return rewrite(between("text", user))


@contextlib.contextmanager
def serve(reply=usual):
    """(url, asked): the server's address and the list of what it is asked."""
    with loopback.serve(Handler, reply=reply) as (url, asked):
        yield f"{url}/v1", asked


def slow(seconds):
    def reply(number, body):
        threading.Event().wait(seconds)
        return usual(number, body)

    return reply
