# sleb on a CPU:  docker build -t sleb .
#   docker run --rm --user "$(id -u)" -v "$PWD":/work sleb prune MODEL --remove 20% -o smaller
# PyPI's torch for Linux brings CUDA, several GB that a CPU has no use for. Without it, with the address
# of torch's builds for a CPU (pytorch.org has it):  docker build --build-arg TORCH="--index-url ADDRESS" .
FROM python:3.12-slim
ARG TORCH=""
WORKDIR /src
COPY constraints.txt ./
RUN pip install --no-cache-dir $TORCH -c constraints.txt torch
COPY pyproject.toml README.md LICENSE ./
COPY src ./src
RUN pip install --no-cache-dir -c constraints.txt . && rm -r src
RUN useradd --create-home sleb && chmod 1777 /home/sleb
# of any user that is given: caches of models and answers go there
ENV HOME=/home/sleb
USER sleb
WORKDIR /work
ENTRYPOINT ["sleb"]
