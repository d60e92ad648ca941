"""A stand-in for a vLLM server, with its routes and forms of answers (vLLM 0.32). No test in itself."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch
from transformers import AutoModelForCausalLM


class VLLMStub(ThreadingHTTPServer):
    """Serves a model from a thread of its own.

    Attributes:
        requests: prompt and sampling parameters of the requests for answers.
        failures: path -> status and text that it answers instead.
        keeps_weights: new weights are not taken over.
        answer_of: (prompt, sampling parameters) -> token ids of every answer.
    """

    daemon_threads = True
    request_queue_size = 512  # connections that wait

    def __init__(self, model):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.model = model
        self.requests, self.headers, self.failures, self.versions, self.resets = [], [], {}, ["default"], 0
        self.vllm_version, self.max_model_len = "0.32.0", 64
        self.keeps_weights = False
        self.answer_of = lambda prompt, params: [9, params["stop_token_ids"][0]]
        self.address = f"http://127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @torch.no_grad()
    def choices(self, prompt, params):
        if "logprobs" in params:
            logits = self.model(torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
            top = [{"token_id": int(i), "logprob": float(logits[i])} for i in logits.topk(params["logprobs"]).indices]
            return [([top[0]["token_id"]], {"content": [{**top[0], "top_logprobs": top}]})]
        self.requests.append((prompt, params))
        return [(self.answer_of(prompt, params), None)] * params["n"]


class _Handler(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        self.respond(None)

    def do_POST(self):
        self.respond(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def respond(self, body):
        self.server.headers.append(dict(self.headers))
        status, content = self.server.failures.get(self.path) or (200, json.dumps(self.content(body)))
        self.send_response(status)
        self.end_headers()
        self.wfile.write(content.encode())

    def content(self, body):
        server = self.server
        if self.path == "/version":
            return {"version": server.vllm_version}
        if self.path == "/v1/models":
            return {"data": [{"id": "m", "root": "/models/m", "max_model_len": server.max_model_len}]}
        if self.path == "/weight_info":
            return {"weight_version": server.versions[-1]}
        if self.path == "/update_weight_version":
            server.versions.append(body["new_version"])
            return {"success": True}
        if self.path == "/collective_rpc":
            assert body["method"] == "reload_weights"
            if not server.keeps_weights:
                server.model = AutoModelForCausalLM.from_pretrained(body["kwargs"]["weights_path"]).eval()
            return {"results": [None]}
        if self.path == "/reset_prefix_cache":
            server.resets += 1
            return {"success": True}
        assert self.path == "/inference/v1/generate"
        found = server.choices(body["token_ids"], body["sampling_params"])
        span = {"version": server.versions[-1], "start": 0}
        choices = [
            {"index": i, "token_ids": ids, "logprobs": logprobs, "weight_versions": [span | {"end": len(ids)}]}
            for i, (ids, logprobs) in enumerate(found)
        ]
        return {"request_id": "r", "choices": choices[::-1]}
