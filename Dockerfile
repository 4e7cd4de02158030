# sleb on a CPU:  docker build -t sleb .
#   docker run --rm -v "$PWD":/work sleb prune MODEL --remove 20% -o smaller
FROM python:3.12-slim
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY src ./src
RUN pip install --no-cache-dir -c constraints.txt . && rm -rf /src
RUN useradd --create-home sleb
USER sleb
WORKDIR /work
ENTRYPOINT ["sleb"]
