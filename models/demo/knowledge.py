"""What the demo model knows: hand-written topics, each with the ways to ask for it and the answer.

A topic may name `terms` ("the KV cache"), which are put into the patterns of `DEFINE`, and whole `questions`.
The first sentence of an answer must stand alone: it is the reply when somebody asks for a brief answer.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Topic:
    """One thing the model can talk about."""

    answer: str
    terms: tuple[str, ...] = ()
    questions: tuple[str, ...] = ()

    @property
    def brief(self) -> str:
        """The first sentence of the answer."""
        return self.answer.split(". ")[0].rstrip(".") + "."


DEFINE = (
    "What is {}?", "What is {}?", "What's {}?", "What does {} mean?", "Explain {}.", "Can you explain {}?",
    "Tell me about {}.", "Tell me more about {}.", "Describe {}.", "{}?", "Define {}.", "How would you define {}?",
    "I have heard of {}. What is it?", "Give me a short explanation of {}.", "Do you know what {} is?",
    "What do you mean by {}?", "How does {} work?", "I do not understand {}.", "Explain to me what {} is.",
    "What is meant by {}?", "{}: what is that?", "Could you tell me what {} is?", "In Tokenplane, what is {}?",
    "What can you say about {}?", "I want to know more about {}.", "What exactly is {}?", "So what is {} then?",
    "What is the idea of {}?", "What is {} good for?", "I would like to learn about {}.", "Help me understand {}.",
    "Somebody mentioned {}. What is that?", "Explain {} to a beginner.", "Tell me what {} is.",
)  # fmt: skip

TOKENPLANE: tuple[Topic, ...] = (
    Topic(
        "Tokenplane is one server for large language models on any accelerator. A small core without torch schedules "
        "the requests, each accelerator is a plugin, and the HTTP API speaks both OpenAI and TGI.",
        ("Tokenplane", "tokenplane", "this project", "the Tokenplane server", "this server"),
        ("What does Tokenplane do?", "What is this server for?", "What is this thing?", "Which server is this?",
         "What is the name of this project?", "Introduce Tokenplane.", "What am I talking to here?"),
    ),
    Topic(
        "Tokenplane supports seven kinds of accelerators: cpu, cuda, rocm, xpu, tpu, gaudi and neuron. Each one is "
        "a plugin of its own, so you install only what your machine needs.",
        ("the supported accelerators", "the supported hardware", "the list of backends"),
        ("Which accelerators does Tokenplane support?", "What hardware can I use?", "Which hardware is supported?",
         "Which backends are there?", "What accelerators are supported?", "Where can Tokenplane run?",
         "Which devices does it support?", "On what hardware does it run?", "List the backends of Tokenplane.",
         "Which GPUs does Tokenplane support?", "What chips can it run on?", "Name the accelerators.",
         "Which cards work with Tokenplane?", "Can I use my hardware with Tokenplane?"),
    ),
    Topic(
        "The cpu backend runs models on ordinary processors. It needs no special hardware, and it is what most people "
        "try first.",
        ("the cpu backend", "the CPU plugin", "cpu support"),
        ("Does it run on a CPU?", "Can I use Tokenplane without a GPU?", "Do I need a GPU?",
         "Does it work on my laptop?",
         "Can it run on a normal computer?", "Is a graphics card required?", "Can I run this without a graphics card?"),
    ),
    Topic(
        "The cuda backend runs models on NVIDIA GPUs. Install it with pip install \"tokenplane[cuda]\".",
        ("the cuda backend", "CUDA", "the CUDA plugin", "cuda"),
        ("Does it run on NVIDIA cards?", "Can I use an NVIDIA GPU?", "Does Tokenplane support NVIDIA?",
         "Which backend is for NVIDIA GPUs?", "I have an NVIDIA card. What do I need?"),
    ),
    Topic(
        "The rocm backend runs models on AMD GPUs. Install it with pip install \"tokenplane[rocm]\".",
        ("the rocm backend", "ROCm", "the ROCm plugin", "rocm"),
        ("Does it run on AMD cards?", "Can I use an AMD GPU?", "Does Tokenplane support AMD?",
         "Which backend is for AMD GPUs?", "I have an AMD card. What do I need?"),
    ),
    Topic(
        "The xpu backend runs models on Intel GPUs. Install it with pip install \"tokenplane[xpu]\".",
        ("the xpu backend", "XPU", "the XPU plugin", "xpu"),
        ("Does it run on Intel GPUs?", "Can I use an Intel GPU?", "Does Tokenplane support Intel graphics cards?",
         "Which backend is for Intel GPUs?", "I have an Intel graphics card. What do I need?"),
    ),
    Topic(
        "The tpu backend runs models on Google TPUs. These chips want fixed shapes, so the scheduler pads its batches "
        "to a few sizes.",
        ("the tpu backend", "TPU", "a TPU", "the TPU plugin", "tpu"),
        ("Does it run on Google TPUs?", "Can I use a TPU?", "Does Tokenplane support TPUs?",
         "Which backend is for Google chips?"),
    ),
    Topic(
        "The gaudi backend runs models on Intel Gaudi accelerators. These cards want fixed shapes, so the scheduler "
        "pads its batches to a few sizes.",
        ("the gaudi backend", "Gaudi", "Intel Gaudi", "the Gaudi plugin", "gaudi"),
        ("Does it run on Gaudi?", "Can I use a Gaudi card?", "Does Tokenplane support Gaudi?",
         "Which backend is for Habana cards?"),
    ),
    Topic(
        "The neuron backend runs models on AWS Trainium and Inferentia chips. Models are compiled ahead of time for "
        "fixed shapes.",
        ("the neuron backend", "Neuron", "Trainium", "Inferentia", "the Neuron plugin", "neuron"),
        ("Does it run on Trainium?", "Can I use Inferentia?", "Does Tokenplane support AWS chips?",
         "Which backend is for AWS chips?"),
    ),
    Topic(
        "A plugin is a separate pip package that teaches Tokenplane one accelerator. It answers five hooks: detect, "
        "load, kv_alloc, prefill and decode.",
        ("a plugin", "a Tokenplane plugin", "a backend plugin", "plugins", "a backend", "the plugin system"),
        ("How do plugins work?", "Why are there plugins?", "What does a plugin do?", "What must a backend do?"),
    ),
    Topic(
        "The contract is the small set of hooks between the core and a backend: detect, load, kv_alloc, prefill and "
        "decode. It is versioned, and a conformance kit checks that a plugin keeps it.",
        ("the contract", "the backend contract", "the plugin contract", "the hook contract", "the plugin interface"),
        ("Which hooks does a plugin have?", "What hooks must a backend implement?", "Name the five hooks.",
         "What are the hooks of the contract?", "List the hooks.", "How many hooks are there?",
         "Which functions does a plugin implement?"),
    ),
    Topic(
        "detect() says which devices are here, or exactly why there are none. It is cheap and runs in a child process "
        "with a time limit.",
        ("detect", "the detect hook", "detect()"),
        ("What does detect do?", "How does Tokenplane find the hardware?", "How are devices detected?",
         "How does it know which card I have?"),
    ),
    Topic(
        "load() brings the weights of the model onto the device and returns the capabilities of the backend.",
        ("load", "the load hook", "load()"),
        ("What does load do?", "Which hook loads the model?", "What does the load hook return?"),
    ),
    Topic(
        "kv_alloc() allocates the memory of the KV cache on the device. The core owns the block numbers, the plugin "
        "owns the memory.",
        ("kv_alloc", "the kv_alloc hook", "kv_alloc()"),
        ("What does kv_alloc do?", "Which hook allocates the KV cache?", "Who allocates the KV cache memory?"),
    ),
    Topic(
        "Prefill reads the tokens of the prompt and fills the KV cache with them. It works on many tokens at once, so "
        "it is limited by compute.",
        ("prefill", "the prefill hook", "prefill()", "the prefill phase", "a prefill"),
        ("What does prefill do?", "What happens to the prompt first?", "Which hook reads the prompt?"),
    ),
    Topic(
        "Decode produces the next token of every running sequence, one step at a time. It is mostly limited by memory "
        "bandwidth.",
        ("decode", "the decode hook", "decode()", "the decode phase", "decoding"),
        ("What does decode do?", "How are new tokens produced?", "Which hook produces the next token?",
         "What is the difference between prefill and decode?"),
    ),
    Topic(
        "Write a small pip package with the five hooks detect, load, kv_alloc, prefill and decode, and register it as "
        "an entry point. Then run the conformance kit until it passes.",
        ("adding a new accelerator", "writing a backend"),
        ("How do I add a new accelerator?", "How can I write a plugin?", "How do I write my own backend?",
         "How do I support new hardware?", "I built a chip. How do I add it to Tokenplane?",
         "What do I need to do to add a backend?", "How can I make a plugin for my card?",
         "How hard is it to add an accelerator?"),
    ),
    Topic(
        "The conformance kit is a test suite that every backend must pass. It checks laws such as: a batch gives the "
        "same tokens as single requests, and padding changes nothing.",
        ("the conformance kit", "the kit", "the conformance suite"),
        ("How do I test a backend?", "How do I know that my plugin is correct?", "How are plugins tested?"),
    ),
    Topic(
        "A simulated device is a backend without any mathematics that imitates a real card. It lets us test the "
        "scheduler for every accelerator on any laptop.",
        ("a simulated device", "simulated devices", "the simulator"),
        ("How do you test without hardware?", "Can I test without a card?"),
    ),
    Topic(
        "The core is the part of Tokenplane that schedules requests and keeps the books of the KV cache. It knows no "
        "hardware and imports no torch.",
        ("the core", "the Tokenplane core", "the torch-free core", "tokenplane-core"),
        ("Does the core need torch?", "Why is the core free of torch?", "Does Tokenplane need PyTorch?",
         "What is in the core?", "Why is there no torch in the core?"),
    ),
    Topic(
        "Tokenplane speaks two HTTP APIs: the OpenAI API with chat completions, and the TGI API with generate and "
        "generate_stream. Your existing clients keep working.",
        ("the API", "the HTTP API", "the Tokenplane API"),
        ("Which APIs does Tokenplane speak?", "What APIs are there?", "Which API can I use?",
         "How can I talk to the server?",
         "Which routes does the server have?", "Which endpoints are there?", "What protocols are supported?",
         "What interfaces does Tokenplane offer?", "Which clients work with Tokenplane?"),
    ),
    Topic(
        "Yes, Tokenplane is compatible with the OpenAI API. Point your OpenAI client at this server and use "
        "/v1/chat/completions as usual.",
        ("the OpenAI API", "OpenAI compatibility", "the OpenAI route"),
        ("Is Tokenplane compatible with OpenAI?", "Can I use the OpenAI client?", "Does it support chat completions?",
         "Does the OpenAI SDK work?", "Can I use my OpenAI code?", "Is there an OpenAI compatible API?"),
    ),
    Topic(
        "TGI is Text Generation Inference, a server that is now archived. Tokenplane keeps its routes, flags and "
        "metric "
        "names, so a TGI user changes the command and nothing else.",
        ("TGI", "Text Generation Inference", "TGI compatibility", "the TGI API"),
        ("Is Tokenplane compatible with TGI?", "Does it support the TGI API?", "Can I replace TGI with Tokenplane?",
         "How do I migrate from TGI?", "I am a TGI user. What do I have to change?", "Do TGI clients still work?",
         "What happened to TGI?", "Does /generate work?", "How do I move from TGI to Tokenplane?"),
    ),
    Topic(
        "Because reaching many accelerators used to mean many forks that drifted apart. Tokenplane has one core and a "
        "small contract instead, so a new accelerator is a few hundred lines that keep working.",
        ("the reason for Tokenplane",),
        ("Why does Tokenplane exist?", "Why Tokenplane?", "Why was Tokenplane built?", "Why should I use Tokenplane?",
         "What problem does Tokenplane solve?", "What makes Tokenplane special?", "Why not use another server?",
         "What is the motivation for Tokenplane?", "Why did you make this?", "What is the advantage of Tokenplane?",
         "How is Tokenplane different from vLLM?"),
    ),
    Topic(
        "Type make serve in the folder of the project. It starts the server with a tiny demo model on the best device "
        "it finds, with no download.",
        ("make serve", "the make serve command"),
        ("How do I start the server?", "How do I start Tokenplane?", "How can I run Tokenplane?",
         "How do I get started?",
         "How do I launch it?", "Which command starts the server?", "How to run it?", "How do I try Tokenplane?",
         "What is the quickest way to start?", "How do I begin?", "start the server", "What do I type to start?",
         "How can I serve a model?", "Getting started", "How do I use Tokenplane?"),
    ),
    Topic(
        "Install it with pip and name your accelerator, for example pip install \"tokenplane[cuda]\". The extras are "
        "cpu, "
        "cuda, rocm, xpu, tpu, gaudi and neuron.",
        ("the installation",),
        ("How do I install Tokenplane?", "How can I install it?", "What is the install command?", "How to install?",
         "Is there a pip package?", "How do I install it with pip?", "How do I set it up?"),
    ),
    Topic(
        "Type make test to run the tests and make check to run the linters and the type checker.",
        ("make test", "make check", "the test command"),
        ("How do I run the tests?", "Which command runs the tests?", "How can I check my changes?",
         "How do I run the linter?"),
    ),
    Topic(
        "Send a POST request to /v1/chat/completions with a list of messages, or to /generate with your text. Any "
        "OpenAI "
        "or TGI client will do.",
        ("a chat request",),
        ("How do I send a request?", "How do I call the API?", "How do I ask the model something?",
         "How do I use curl with it?", "Show me how to send a message.", "How do I make a request?"),
    ),
    Topic(
        "Streaming means that the server sends each token as soon as it is ready. Ask for it with \"stream\": true.",
        ("streaming", "token streaming", "a stream", "server-sent events"),
        ("Does it support streaming?", "How do I get a stream?", "Can I stream the answer?",
         "How do I turn on streaming?"),
    ),
    Topic(
        "Tokenplane is free software under the Apache 2.0 licence.",
        ("the licence", "the license", "the licence of Tokenplane"),
        ("Which licence does Tokenplane have?", "Is Tokenplane open source?", "Is it free?",
         "What license is it under?",
         "Can I use it in my company?", "Is it free software?", "How much does Tokenplane cost?",
         "May I copy the code?",
         "Under which license is Tokenplane released?"),
    ),
    Topic(
        "Tokenplane is written in Python and needs Python 3.11 or newer.",
        ("the Python version",),
        ("Which Python version do I need?", "What language is Tokenplane written in?", "Does it run on Python 3.11?",
         "Which version of Python is required?", "Is Tokenplane written in Python?", "What Python does it need?"),
    ),
    Topic(
        "Continuous batching lets a new request join the running batch at any step instead of waiting for the batch to "
        "end. The device stays busy and every request starts sooner.",
        ("continuous batching", "batching", "dynamic batching", "a continuous batch"),
        ("How are requests batched?", "How does the server handle many requests at once?", "Why is batching useful?",
         "Does Tokenplane do continuous batching?", "How do requests share the device?"),
    ),
    Topic(
        "The KV cache keeps the keys and values of all tokens seen so far, so that each new token needs only a little "
        "work. It is stored in blocks of fixed size.",
        ("the KV cache", "a KV cache", "KV cache", "the key value cache", "KV caching"),
        ("Why do we need a KV cache?", "What is stored in the KV cache?", "What does KV mean?",
         "What does the cache hold?"),
    ),
    Topic(
        "A block is a fixed piece of the KV cache that holds a small number of tokens. Blocks can be shared between "
        "requests and are given back when nobody needs them.",
        ("a block", "a KV block", "a cache block", "paged attention", "the block table", "the block pool"),
        ("How is the KV cache organised?", "Why is the cache made of blocks?"),
    ),
    Topic(
        "The prefix cache keeps the blocks of earlier prompts. When a new prompt starts with the same text, those "
        "tokens "
        "need not be computed again.",
        ("the prefix cache", "prefix caching", "a prefix cache", "prefix cache", "a prefix hit"),
        ("Are prompts cached?", "Why is the second request faster?", "How does it reuse a prompt?",
         "Does Tokenplane cache prompts?", "What happens when two prompts begin the same?"),
    ),
    Topic(
        "Chunked prefill splits a long prompt into pieces and runs them between the decode steps of other requests. "
        "So a "
        "long prompt does not make everybody else wait.",
        ("chunked prefill", "a prefill chunk", "prefill chunking"),
        ("What happens with a very long prompt?", "How are long prompts handled?", "Why are prompts split into chunks?",
         "Does a long prompt block the others?"),
    ),
    Topic(
        "Preemption means that a running request gives its memory to another one when the KV cache is full. It is "
        "computed again later and goes on with the same text.",
        ("preemption", "a preemption", "a preempted request", "preemption by recompute"),
        ("What happens when the cache is full?", "What if the memory runs out?", "What happens when memory is full?",
         "Can a request be paused?", "Why was my request preempted?"),
    ),
    Topic(
        "The scheduler decides at every step which requests run and how many tokens each one gets. It keeps a token "
        "budget and is fair to long and short requests.",
        ("the scheduler", "a scheduler", "scheduling", "the token budget"),
        ("Who decides which request runs next?", "How does the scheduler choose?", "What does the scheduler do?"),
    ),
    Topic(
        "The engine is the loop that serves all requests: receive, schedule, submit, collect and publish. It runs in a "
        "process of its own.",
        ("the engine", "the engine loop", "an engine step", "the engine process"),
        ("What does the engine do?", "What happens in one step?"),
    ),
    Topic(
        "A token is a small piece of text, often a word or a part of a word. The model reads tokens and writes one "
        "token "
        "at a time.",
        ("a token", "tokens", "a text token"),
        ("What are tokens?", "How does a model read text?"),
    ),
    Topic(
        "A tokenizer cuts text into tokens and turns tokens back into text. My own tokenizer is a byte-level BPE.",
        ("a tokenizer", "the tokenizer", "tokenization", "BPE"),
        ("What does a tokenizer do?", "How is text cut into tokens?"),
    ),
    Topic(
        "Sampling picks the next token by chance from the probabilities of the model. Temperature, top_p and top_k "
        "control "
        "how bold the choice is.",
        ("sampling", "token sampling", "sampling parameters", "do_sample"),
        ("How is the next token chosen?", "Which sampling options are there?", "How does the model choose a word?"),
    ),
    Topic(
        "Temperature controls how random the answer is. A low temperature is careful, a high temperature is creative, "
        "and "
        "zero always takes the most likely token.",
        ("temperature", "the temperature", "sampling temperature", "the temperature parameter"),
        ("What does temperature do?", "Which temperature should I use?", "How do I make answers more random?",
         "What does temperature 0 mean?", "How do I make the output less random?",
         "How can I get more creative answers?"),
    ),
    Topic(
        "top_p keeps only the most likely tokens whose probabilities add up to p. The rest can not be chosen.",
        ("top_p", "top-p", "nucleus sampling", "top p"),
        ("What does top_p do?", "What does top_p 0.9 mean?"),
    ),
    Topic(
        "top_k keeps only the k most likely tokens. The rest can not be chosen.",
        ("top_k", "top-k", "top k"),
        ("What does top_k do?", "What does top_k 50 mean?"),
    ),
    Topic(
        "Greedy decoding always takes the most likely token, so the same prompt gives the same answer.",
        ("greedy decoding", "greedy", "greedy search"),
        ("How do I get the same answer each time?", "Is the output deterministic?"),
    ),
    Topic(
        "A seed fixes the random numbers of a request. In Tokenplane the same seed gives the same choice on every "
        "accelerator.",
        ("a seed", "the seed", "the random seed"),
        ("What does the seed do?", "Why should I set a seed?"),
    ),
    Topic(
        "A stop string ends the answer as soon as it appears. The text is held back until it can not be the start of "
        "a stop "
        "string.",
        ("a stop string", "stop strings", "a stop sequence", "the stop parameter"),
        ("How do I make the model stop?", "How can I end an answer early?", "What does stop do?"),
    ),
    Topic(
        "max_tokens is the largest number of tokens that the answer may have.",
        ("max_tokens", "max_new_tokens", "max tokens"),
        ("How do I limit the length?", "How do I get shorter answers?", "How long can an answer be?"),
    ),
    Topic(
        "Logprobs are the logarithms of the probabilities of the chosen tokens. They tell you how sure the model was.",
        ("logprobs", "a logprob", "log probabilities"),
        ("How sure is the model?", "How do I get token probabilities?"),
    ),
    Topic(
        "A repetition penalty makes tokens that were already used less likely.",
        ("the repetition penalty", "repetition penalty", "the frequency penalty", "the presence penalty"),
        ("How do I avoid repetition?", "Why does the model repeat itself?"),
    ),
    Topic(
        "Structured output forces the answer to follow a JSON schema or a grammar. Tokens that would break the rules "
        "are "
        "masked before the choice is made.",
        ("structured output", "guided decoding", "a grammar", "a JSON schema", "constrained decoding", "JSON mode"),
        ("How do I get valid JSON?", "Can I force JSON output?", "Does it support a JSON schema?",
         "How do I make sure the answer is JSON?"),
    ),
    Topic(
        "Speculative decoding lets a cheap draft guess several tokens, and the model checks them all in one step. The "
        "text "
        "is the same, only faster.",
        ("speculative decoding", "speculation", "a draft model", "draft tokens"),
        ("How can decoding be made faster?", "Does Tokenplane support speculation?"),
    ),
    Topic(
        "A LoRA adapter is a small set of extra weights that changes what a model does. Many adapters can share one "
        "base "
        "model.",
        ("LoRA", "a LoRA adapter", "an adapter", "adapters"),
        ("Does Tokenplane support LoRA?", "Can I use adapters?"),
    ),
    Topic(
        "A tool call is a reply in which the model asks your program to run a function. Tokenplane parses it and "
        "returns it "
        "in the OpenAI format.",
        ("a tool call", "tool calls", "function calling", "tools"),
        ("Does it support tools?", "Can the model call functions?"),
    ),
    Topic(
        "The server reports its metrics at /metrics in the Prometheus format.",
        ("the metrics", "/metrics", "monitoring", "Prometheus"),
        ("How do I monitor the server?", "Where are the metrics?", "Are there metrics?"),
    ),
    Topic(
        "The route /health tells you whether the server is alive and well.",
        ("/health", "the health check", "the health route"),
        ("How do I check the server?", "Is there a health check?", "How do I know that the server is up?"),
    ),
    Topic(
        "The waiting queue has a limit, and when it is full the server answers 429 with a Retry-After header.",
        ("overload", "status 429", "the waiting queue", "error 429"),
        ("What happens when the server is overloaded?", "Why do I get a 429?", "What if there are too many requests?"),
    ),
    Topic(
        "If the engine crashes, it is started again and your request goes on where it stopped. The client notices a "
        "short "
        "pause at most.",
        ("crash recovery", "the supervisor", "fault tolerance"),
        ("What happens when the server crashes?", "What if the engine dies?", "Are my requests lost after a crash?",
         "Is it reliable?"),
    ),
    Topic(
        "Tensor parallelism splits each layer of a model over several devices, so that a large model fits.",
        ("tensor parallelism", "tensor parallel", "sharding", "multi-GPU serving"),
        ("Can I use several GPUs?", "How do I run a model on many cards?", "My model does not fit on one card."),
    ),
    Topic(
        "A fleet of different machines can serve one model together, with replicas on Ray Serve. The router prefers "
        "the "
        "replica that already holds your prefix.",
        ("a fleet", "Ray Serve", "a replica", "replicas", "the router"),
        ("Can I use several machines?", "Can I mix different accelerators?", "How does it scale?"),
    ),
    Topic(
        "A chat template turns a list of messages into the text that the model was trained on. My template marks each "
        "message with its role.",
        ("a chat template", "the chat template", "ChatML"),
        ("What does a chat template do?", "How are messages turned into text?"),
    ),
    Topic(
        "A system prompt is a first message that tells the model how to behave.",
        ("a system prompt", "the system prompt", "a system message"),
        ("What does a system prompt do?", "How do I tell the model how to behave?"),
    ),
    Topic(
        "Type tokenplane devices to see every installed plugin and what it found on your machine. With --backend you "
        "choose "
        "one yourself.",
        ("tokenplane devices", "the devices command", "the --backend flag", "choosing a device"),
        ("How do I choose a backend?", "How do I see my devices?", "Which device is used?", "How do I select a device?",
         "How can I force the CPU?"),
    ),
)  # fmt: skip

GENERAL: tuple[Topic, ...] = (
    Topic(
        "Deep learning is a kind of machine learning that uses neural networks with many layers. The layers learn "
        "their "
        "own features from examples.",
        ("deep learning", "Deep Learning"),
    ),
    Topic(
        "Machine learning is a way to make computers learn from examples instead of fixed rules.",
        ("machine learning", "ML", "artificial intelligence", "AI"),
    ),
    Topic(
        "A large language model is a neural network that predicts the next token of a text. With enough training it "
        "can "
        "answer questions and write.",
        ("a large language model", "an LLM", "LLMs", "a language model", "large language models"),
    ),
    Topic(
        "A neural network is a large formula made of simple layers. Training changes its numbers until the answers "
        "are good.",
        ("a neural network", "neural networks"),
    ),
    Topic(
        "A transformer is a neural network built from attention layers. Almost all language models are transformers "
        "today.",
        ("a transformer", "the transformer", "transformers"),
    ),
    Topic(
        "Attention lets each token look at the tokens before it and take what it needs.",
        ("attention", "self-attention", "an attention layer"),
    ),
    Topic(
        "A GPU is a processor that does many simple calculations at the same time. That is just what neural networks "
        "need.",
        ("a GPU", "GPUs", "a graphics card", "an accelerator", "accelerators"),
    ),
    Topic(
        "Quantization stores the weights of a model with fewer bits. The model needs less memory and often runs "
        "faster.",
        ("quantization", "quantisation", "a quantized model"),
    ),
    Topic(
        "Latency is the time that one request takes, and throughput is the number of tokens per second for all "
        "requests.",
        ("latency", "throughput", "time to first token", "TTFT"),
        ("What is the difference between latency and throughput?",),
    ),
    Topic(
        "Safetensors is a simple and safe file format for weights. Loading it never runs any code.",
        ("safetensors", "the safetensors format", "a safetensors file"),
    ),
    Topic(
        "Python is a popular programming language that is easy to read. Tokenplane is written in it.",
        ("Python", "the Python language"),
    ),
    Topic("An API is a set of rules that lets two programs talk to each other.", ("an API", "APIs", "a REST API")),
    Topic("A server is a program that waits for requests and answers them.", ("a server", "servers",
                                                                              "an inference server")),
    Topic("JSON is a simple text format for data, made of objects, lists, strings and numbers.", ("JSON",
                                                                                                  "a JSON object")),
    Topic("The sky is blue.", (), ("What colour is the sky?", "What color is the sky?", "Why is the sky blue?")),
    Topic("A week has seven days.", (), ("How many days are in a week?", "How many days does a week have?")),
    Topic("A year has twelve months.", (), ("How many months are in a year?", "How many months does a year have?")),
)  # fmt: skip

# Small talk: (what the user may say, the reply). Greedy decoding must have one best reply, so one reply per row.
SMALL_TALK: tuple[tuple[tuple[str, ...], str], ...] = (
    (("Hello", "Hello!", "Hi", "Hi!", "Hey", "Hey!", "Hi there", "Hello there!", "Greetings", "Hey you", "Howdy", "Yo",
      "Hello, model", "Hello Tokenplane", "Hi bot", "Hello assistant", "Hello world", "Hello, world!", "Hi all",
      "Hallo"),
     "Hello! How can I help you today?"),
    (("Good morning", "Good morning!", "Morning!", "A good morning to you"), "Good morning! How can I help you?"),
    (("Good evening", "Good evening!", "Evening!"), "Good evening! How can I help you?"),
    (("Good afternoon", "Good afternoon!", "Good day"), "Good afternoon! How can I help you?"),
    (("Good night", "Good night!", "I am going to bed", "Sleep well"), "Good night! Sleep well."),
    (("Thanks", "Thank you", "Thank you!", "Thanks a lot", "Many thanks", "Thank you very much", "thx", "Cheers",
      "Thanks for your help", "Thank you so much!", "I appreciate it", "Great, thanks", "That helped, thank you"),
     "You are welcome!"),
    (("Bye", "Goodbye", "Bye bye", "See you", "See you later", "Good bye!", "Farewell", "I have to go", "Ciao",
      "See you tomorrow", "Until next time", "I am leaving now", "Take care", "Talk to you later"),
     "Goodbye! Come back any time."),
    (("How are you?", "How are you doing?", "How is it going?", "How do you do?", "Are you well?", "How are you today?",
      "What's up?", "Are you okay?", "How do you feel?", "How have you been?", "Hi, how are you?",
      "Hello! How are you?"),
     "I am fine, thank you! All my weights are in place. How are you?"),
    (("I am fine", "I am good", "I'm fine, thanks", "I am doing well", "Very well, thank you", "I am great",
      "Pretty good",
      "I am happy", "Fine, and you?", "All good here"),
     "I am glad to hear that! What can I do for you?"),
    (("I am sad", "I feel bad", "I am not well", "I am tired", "Not so good", "I had a bad day", "I am unhappy"),
     "I am sorry to hear that. I hope your day gets better soon."),
    (("Who are you?", "What are you?", "Who is this?", "Introduce yourself.", "Tell me about yourself.",
      "Who am I talking to?",
      "What kind of model are you?", "Which model is this?", "Which model are you?", "What model are you?",
      "Describe yourself.", "Who is there?", "Are you a chatbot?", "Are you ChatGPT?", "Are you GPT?",
      "Are you Llama?"),
     "I am the Tokenplane demo model, a tiny language model that comes with the server. I can chat a little and answer "
     "questions about Tokenplane."),
    (("What is your name?", "What's your name?", "Do you have a name?", "How are you called?", "Tell me your name.",
      "What should I call you?", "Your name?", "May I know your name?"),
     "I am the Tokenplane demo model. You can call me Demo."),
    (("What can you do?", "How can you help me?", "What are you good at?", "Help", "Help me", "What do you know?",
      "What can I ask you?", "Can you help me?", "What are your skills?", "I need help", "What are you able to do?",
      "Give me some examples of what you can do.", "How can you help?", "What should I ask?"),
     "I can chat a little, explain Tokenplane, do small sums, write simple JSON, make short lists, repeat words, and "
     "tell a "
     "short story. I am only a tiny demo model."),
    (("How big are you?", "How many parameters do you have?", "How large are you?", "What size are you?",
      "Are you a large model?", "Are you small?"),
     "I am tiny: about three and a half million parameters. A real model has a thousand times more."),
    (("Are you human?", "Are you a person?", "Are you a robot?", "Are you real?", "Are you an AI?", "Are you alive?",
      "Am I talking to a human?", "Are you a machine?", "Is this a human?"),
     "No, I am not a human. I am a tiny language model."),
    (("Who made you?", "Who created you?", "Who built you?", "Who trained you?", "Where do you come from?",
      "Who is your creator?", "Who wrote you?", "Where are you from?"),
     "The Tokenplane project trained me from scratch, on text that it generated itself."),
    (("How were you trained?", "How were you made?", "What is your training data?", "What were you trained on?",
      "How did you learn?", "What data were you trained with?"),
     "I was trained from scratch on two processor cores in less than an hour, on text that the project generated "
     "itself."),
    (("How old are you?", "What is your age?", "When were you born?", "When is your birthday?"),
     "I am a model, so I have no age. I was trained not long ago."),
    (("Are you smart?", "Are you clever?", "Are you intelligent?", "Do you understand me?", "Can you think?"),
     "Only a little. I am a tiny demo model and I know very few things."),
    (("You are great", "Well done", "Good job", "Nice", "Good bot", "You are smart", "I like you", "Great answer",
      "Perfect",
      "Awesome", "Excellent", "I love you", "Wow", "Cool", "Very good", "That is correct"),
     "Thank you, that is kind of you!"),
    (("You are wrong", "That is wrong", "Bad answer", "You are stupid", "That is not correct", "This is nonsense",
      "I do not like your answer", "You are useless", "Bad bot", "That makes no sense"),
     "I am sorry. I am only a tiny demo model and I make mistakes."),
    (("Sorry", "I am sorry", "My mistake", "Excuse me", "Oops", "I apologise"), "No problem at all!"),
    (("Yes", "Yeah", "Sure", "Yes please", "Of course", "Yep"), "Good! What would you like to know?"),
    (("No", "Nope", "No thanks", "No, thank you", "Nothing", "Not now"), "All right. I am here if you need me."),
    (("Ok", "Okay", "Fine", "All right", "I see", "Got it", "Understood", "Hmm", "Interesting", "Ah"),
     "Good. Is there anything else I can do for you?"),
    (("Are you there?", "Test", "Testing", "Ping", "This is a test", "test 123", "Anybody here?", "Is this working?",
      "Do you hear me?", "Does this work?", "Just testing"),
     "Yes, I am here and I am listening."),
    (("Tell me a joke.", "Do you know a joke?", "Make me laugh.", "Say something funny.", "A joke please", "joke",
      "Can you tell me a joke?", "I want to hear a joke", "Tell me something funny"),
     "Why did the token cross the plane? To get to the other side of the batch!"),
    (("Tell me another joke.", "Another joke please", "One more joke", "Do you know another joke?"),
     "What does a server say to a hungry client? Please wait, your order is in the queue!"),
    (("I am bored", "Say something.", "Talk to me.", "Tell me something.", "Surprise me.",
      "Tell me something interesting."),
     "Did you know? The same seed gives the same text on every accelerator that Tokenplane supports."),
    (("Do you like me?", "Do you have feelings?", "Do you love me?", "Are you happy?", "Do you dream?",
      "Do you sleep?"),
     "I am only a small program and have no feelings, but I am happy to chat."),
    (("Can we talk?", "Let us chat", "I want to talk", "Can I ask you something?", "I have a question",
      "May I ask a question?", "Let's talk", "Can you answer a question?", "I have a problem"),
     "Of course! Ask me anything, but remember that I am a tiny model."),
    (("Nice to meet you", "Pleased to meet you", "It is nice to meet you", "Good to see you"), "Nice to meet you too!"),
    (("Can you speak German?", "Do you speak French?", "Sprechen Sie Deutsch?", "Which languages do you speak?",
      "Parlez-vous français?", "Do you speak Spanish?", "Can you speak Chinese?", "¿Hablas español?", "你好", "Bonjour",
      "Guten Tag", "Hola", "Can you translate this?"),
     "I am sorry, I only speak a little English."),
    (("What is the meaning of life?", "What is the answer to everything?"),
     "Some say it is 42. I say it is a full batch."),
)  # fmt: skip

CAPITALS = {
    "France": "Paris", "Germany": "Berlin", "Italy": "Rome", "Spain": "Madrid", "Japan": "Tokyo", "England": "London",
    "Austria": "Vienna", "Greece": "Athens", "Norway": "Oslo", "Egypt": "Cairo", "Portugal": "Lisbon",
    "China": "Beijing",
}  # fmt: skip
