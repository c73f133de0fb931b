"""A small OpenAI-compatible server that gives prepared answers: for what clients do with good, bad and no answers."""

import contextlib
import json
import threading
import time
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

ROOT = "/models/Qwen3-8B-FP8"
MODEL = {"object": "model", "created": 0, "owned_by": "vllm", "root": ROOT, "max_model_len": 4096}


@contextlib.contextmanager
def answering(
    answers: Mapping[str, str], model: str = "qwen3-8b-fp8", port: int = 0, pause: float = 0
) -> Iterator[str]:
    """Serve `model` on the loopback address; a prompt that contains a key gets its answer, word by word.

    `pause`: seconds before each word.
    """

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *arguments: object) -> None:
            pass

        def reply(self, body: object, status: int = 200) -> None:
            data = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def send_event(self, data: str) -> None:
            self.wfile.write(f"data: {data}\n\n".encode())

        def do_GET(self) -> None:
            if self.path == "/version":
                self.reply({"version": "0.30.0"})
            elif self.path == "/v1/models":
                self.reply({"object": "list", "data": [MODEL | {"id": model}]})
            else:
                self.reply({}, 200 if self.path == "/health" else 404)

        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if request["model"] != model:
                self.reply({"error": {"message": f"The model {request['model']} does not exist."}}, 404)
                return
            text = next(answer for part, answer in answers.items() if part in request["prompt"])
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.end_headers()
            words = text.split(" ")
            about = {"id": "1", "object": "text_completion", "created": 0, "model": model}
            for word in words:
                time.sleep(pause)
                choice = {"index": 0, "text": f" {word}", "finish_reason": None, "logprobs": None}
                self.send_event(json.dumps(about | {"choices": [choice]}))
            usage = {"prompt_tokens": 1, "completion_tokens": len(words), "total_tokens": 1 + len(words)}
            self.send_event(json.dumps(about | {"choices": [], "usage": usage}))
            self.send_event("[DONE]")

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
