"""What glm-nano knows about glmjax: questions in several wordings, and one true answer to each."""

from __future__ import annotations

from typing import NamedTuple


class Question(NamedTuple):
    """A question.

    Attributes:
        thought: a terse one.
        answer: short and true.
        frame: which of FRAMES its subjects are put into; "" for none.
        subjects: what {x} is.
        others: wordings of its own.
    """

    thought: str
    answer: str
    frame: str = ""
    subjects: tuple[str, ...] = ()
    others: tuple[str, ...] = ()


FRAMES = {
    "what": (
        "What is {x}?",
        "What's {x}?",
        "Tell me about {x}.",
        "Explain {x}.",
        "Describe {x}.",
        "Can you explain {x}?",
        "What does {x} mean?",
    ),
    "how": (
        "How do I {x}?",
        "How can I {x}?",
        "Tell me how to {x}.",
        "I want to {x}. How?",
        "What is the way to {x}?",
        "How does one {x}?",
        "Show me how to {x}.",
    ),
    "can": (
        "Can glmjax {x}?",
        "Does glmjax {x}?",
        "Is glmjax able to {x}?",
        "Will glmjax {x}?",
        "I wonder if glmjax can {x}.",
        "Tell me if glmjax can {x}.",
    ),
    "which": (
        "Which {x}?",
        "What {x}?",
        "Tell me which {x}.",
        "I want to know which {x}.",
        "Do you know which {x}?",
        "Say which {x}.",
    ),
    "where": (
        "Where is {x}?",
        "Where do I find {x}?",
        "Where can I find {x}?",
        "Tell me where {x} is.",
        "In which file is {x}?",
        "I am looking for {x}.",
    ),
}

QUESTIONS = (
    Question(
        "greeting",
        "Hello! How can I help?",
        others=(
            "Hello",
            "Hi",
            "Hello there",
            "Hey",
            "Good morning",
            "Hi there",
            "Good evening",
            "Hi, how do you do?",
        ),
    ),
    Question(
        "thanks",
        "You are welcome.",
        others=(
            "Thanks",
            "Thank you",
            "Thanks a lot!",
            "Thank you very much.",
            "Many thanks",
            "Great, thanks.",
            "That helped, thank you.",
            "Thanks for the help.",
        ),
    ),
    Question(
        "farewell",
        "Goodbye!",
        others=(
            "Bye",
            "Goodbye",
            "See you",
            "Bye bye!",
            "See you later.",
            "I have to go.",
            "So long",
        ),
    ),
    Question(
        "small talk",
        "I am well, thank you.",
        others=(
            "How are you?",
            "How are you doing?",
            "How is it going?",
            "Are you well?",
            "How do you feel?",
            "How are you today?",
            "What's up?",
        ),
    ),
    Question(
        "who I am",
        "I am glm-nano, a tiny GLM-4.5 model trained by glmjax.",
        others=(
            "Who are you?",
            "What are you?",
            "What is your name?",
            "Tell me your name.",
            "Introduce yourself.",
            "What is glm-nano?",
            "Which model are you?",
            "What's your name?",
            "Are you glm-nano?",
            "What model am I talking to?",
        ),
    ),
    Question(
        "who trained me",
        "glmjax trained me on data that a program wrote.",
        others=(
            "Who trained you?",
            "Who made you?",
            "How were you trained?",
            "Where do you come from?",
            "What were you trained on?",
            "Who built you?",
            "On which data were you trained?",
        ),
    ),
    Question(
        "what I can do",
        "I can add, count, copy text, answer from facts and call tools.",
        others=(
            "What can you do?",
            "What are you good at?",
            "Tell me what you can do.",
            "How can you help me?",
            "What are your skills?",
            "Which tasks can you do?",
            "What do you know?",
            "Help",
        ),
    ),
    Question(
        "my size",
        "I am tiny: about 5 million parameters in 5 layers.",
        others=(
            "How large are you?",
            "How big are you?",
            "How many parameters do you have?",
            "What is your size?",
            "Are you a large model?",
            "How many layers do you have?",
            "Are you big?",
        ),
    ),
    Question(
        "what glmjax is",
        "glmjax is a server for GLM-4.5 language models, in JAX.",
        "what",
        ("glmjax",),
        ("What is glmjax for?", "What does glmjax do?"),
    ),
    Question(
        "models served",
        "GLM-4.5, GLM-4.5-Air, GLM-4.6 and GLM-4.7.",
        "which",
        ("models does glmjax serve", "models can I use"),
        ("Which models are served?",),
    ),
    Question(
        "convert",
        "Run: python convert/hf_to_orbax.py GLM-4.5-Air glm-4.5-air",
        "how",
        ("convert a checkpoint", "convert a model"),
    ),
    Question(
        "interrupted conversion",
        "Run it again: it goes on where it stopped.",
        others=(
            "The conversion was interrupted. What now?",
            "What if the conversion is interrupted?",
            "How do I resume a conversion?",
            "Can I resume a conversion?",
            "My conversion stopped. What do I do?",
            "How do I continue a conversion?",
            "What happens if the conversion stops?",
        ),
    ),
    Question(
        "--verify",
        "With --verify the converter rereads and compares every tensor.",
        "what",
        ("--verify",),
        ("How do I check a conversion?", "How do I verify a conversion?"),
    ),
    Question(
        "serve",
        "Run: python serve.py --model glm-4.5-air --mesh 8",
        "how",
        ("start the server", "serve a model"),
    ),
    Question(
        "make serve",
        "It builds .venv, then serves a small model.",
        "what",
        ("make serve",),
        ("What does make serve do?",),
    ),
    Question(
        "--mesh",
        "--mesh says over how many devices the model is sharded.",
        "what",
        ("--mesh", "the mesh option"),
    ),
    Question(
        "mesh 8",
        "--mesh 8 shards the model over 8 devices.",
        "what",
        ("--mesh 8",),
        ("What does --mesh 8 do?",),
    ),
    Question(
        "mesh 2x4",
        "--mesh 2x4 is 2 groups of 4 devices.",
        "what",
        ("--mesh 2x4",),
        ("What does --mesh 2x4 do?",),
    ),
    Question(
        "HTTP port",
        "HTTP is on port 30000.",
        "which",
        ("port is used", "port does the server use", "is the HTTP port"),
    ),
    Question(
        "gRPC port",
        "gRPC is on port 30001.",
        "which",
        ("port does gRPC use", "is the gRPC port"),
    ),
    Question(
        "change port",
        "Give serve.py another one with --port.",
        "how",
        ("change the port", "use another port"),
    ),
    Question(
        "gRPC",
        "Yes, in SGLang's form: gateways such as smg work.",
        others=(
            "Is there gRPC?",
            "Does glmjax speak gRPC?",
            "Is gRPC supported?",
            "Can I use gRPC?",
            "Does glmjax have gRPC?",
            "Can I put a gateway in front?",
            "Does it work with smg?",
        ),
    ),
    Question(
        "OpenAI",
        "/v1/chat/completions works as OpenAI's.",
        others=(
            "Is there an OpenAI API?",
            "Can I use the OpenAI client?",
            "Does glmjax speak the OpenAI protocol?",
            "Is it compatible with OpenAI?",
            "Does the OpenAI client work?",
            "Which path is for chat?",
            "Where do I send chat messages?",
        ),
    ),
    Question(
        "/generate",
        "/generate is SGLang's form: token ids in and out.",
        "what",
        ("/generate", "the path /generate"),
    ),
    Question(
        "/health",
        "Ask /health.",
        "how",
        ("check the server", "see if the server is up", "check the health"),
    ),
    Question(
        "Python",
        "Call glmjax.generate, or keep a model loaded with glmjax.LLM.",
        "how",
        ("use it from Python", "call glmjax from Python"),
    ),
    Question(
        "LLM",
        "glmjax.LLM keeps the model loaded for more calls.",
        "what",
        ("glmjax.LLM", "the class LLM"),
    ),
    Question(
        "precision",
        "BF16, float32 and FP8 weights.",
        "which",
        ("weights are supported", "precision is supported", "data types are supported"),
    ),
    Question(
        "sampling",
        "Greedy, and temperature with top-k and top-p.",
        "which",
        ("sampling is supported", "sampling methods are there"),
    ),
    Question(
        "streaming",
        "Yes, with stream set to true.",
        "can",
        ("stream", "stream answers"),
    ),
    Question(
        "seed",
        "No, samples depend on the seed only.",
        others=(
            "Does the batch change what I get?",
            "Do other requests change my answer?",
            "Does sampling depend on the batch?",
            "Do other users change my samples?",
            "Is my answer changed by other requests?",
            "Does it matter who shares the batch?",
        ),
    ),
    Question(
        "GPU needed",
        "No GPU is needed: a CPU will do.",
        others=(
            "Do I need a GPU?",
            "Is a GPU needed?",
            "Can I run glmjax on a CPU?",
            "Does glmjax run on a CPU?",
            "Does it work without a GPU?",
            "I have no GPU. Can I use glmjax?",
            "Must I have a GPU?",
        ),
    ),
    Question(
        "written in",
        "glmjax is written in Python, with JAX and Flax.",
        others=(
            "What is glmjax written in?",
            "Which language is glmjax written in?",
            "Does glmjax use JAX?",
            "Does glmjax use Flax?",
            "What is glmjax built on?",
            "Which libraries does glmjax use?",
            "Is glmjax a Python program?",
        ),
    ),
    Question(
        "Python version",
        "Python 3.11 or later.",
        "which",
        ("Python do I need", "Python version is needed", "version of Python is used"),
    ),
    Question(
        "paged KV cache",
        "It keeps keys and values in pages of one pool.",
        "what",
        ("the paged KV cache", "the KV cache"),
    ),
    Question(
        "continuous batching",
        "Requests join and leave the batch at every step.",
        "what",
        ("continuous batching",),
    ),
    Question(
        "tests",
        "Run make test.",
        "how",
        ("run the tests", "test glmjax", "start the test suite"),
    ),
    Question(
        "license",
        "Apache-2.0.",
        others=(
            "What is the license?",
            "Which license does glmjax have?",
            "How is glmjax licensed?",
            "Tell me the license.",
            "What's the license of glmjax?",
            "Under which license is it?",
            "Is glmjax open source?",
        ),
    ),
    Question(
        "architecture",
        "In docs/architecture.md.",
        "where",
        ("the architecture", "the design document", "a description of the parts"),
    ),
)
