# One image with both services, and one more with the load test beside them (`--target load`).
# `docker build --target services -t shipments:local .`, or `docker compose build`. Needs no BuildKit: what the services
# need of others is compiled once and kept in layers.

# What decides which dependencies are compiled: manifests, the lock file and vendor/, with empty crates in place of ours.
FROM rust:1.95-slim-bookworm AS manifests
WORKDIR /source
COPY . .
RUN find . -path ./vendor -prune -o -type f ! -name Cargo.toml ! -name Cargo.lock -exec rm {} + \
 && for manifest in */Cargo.toml; do \
        mkdir -p "${manifest%/*}/src" && touch "${manifest%/*}/src/lib.rs" && echo 'fn main() {}' >"${manifest%/*}/src/main.rs"; \
    done

FROM rust:1.95-slim-bookworm AS build
# librdkafka is compiled from C, and linked to OpenSSL and zlib; its configure script asks for a C++ compiler as well.
RUN apt-get update \
 && apt-get install -y --no-install-recommends g++ libc6-dev make pkg-config libssl-dev zlib1g-dev \
 && rm -rf /var/lib/apt/lists/*
WORKDIR /source
# The dependencies: this layer is made again only when the first stage gives something else.
COPY --from=manifests /source .
RUN cargo build --release --locked --workspace --bin logistics-svc --bin commerce-consumer
COPY . .
# Cargo goes by times, and files are as old as their check-out.
RUN find . -path ./vendor -prune -o -path ./target -prune -o -type f -exec touch {} + \
 && cargo build --release --locked --workspace --bin logistics-svc --bin commerce-consumer \
 && strip --strip-debug target/release/logistics-svc target/release/commerce-consumer

FROM debian:bookworm-slim AS services
RUN apt-get update \
 && apt-get install -y --no-install-recommends ca-certificates libssl3 zlib1g \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --system --uid 10001 --no-create-home --shell /usr/sbin/nologin shipments
COPY --from=build /source/target/release/logistics-svc /source/target/release/commerce-consumer /usr/local/bin/
COPY compose/ready /usr/local/bin/ready
USER 10001
# Both ports are above 1024. Whoever publishes them decides who may reach them.
ENV LOGISTICS_LISTEN=0.0.0.0:8080 COMMERCE_LISTEN=0.0.0.0:8081 LOG_FORMAT=json
EXPOSE 8080 8081
# A container runs one of the services, so one of the two ports answers.
HEALTHCHECK --interval=2s --timeout=3s --start-period=30s --retries=5 CMD ["ready", "8080", "8081"]
# SIGTERM drains for up to SHUTDOWN_DEADLINE (25 s): give a container more than that before it is killed.
STOPSIGNAL SIGTERM
CMD ["logistics-svc", "all"]

FROM build AS build-load
RUN cargo build --release --locked --workspace --bin loadtest \
 && strip --strip-debug target/release/loadtest

# For profile `load`. It starts the services that it measures itself, so they are in its image.
FROM services AS load
COPY --from=build-load /source/target/release/loadtest /usr/local/bin/
HEALTHCHECK NONE
WORKDIR /results
ENTRYPOINT ["loadtest"]
CMD ["--help"]

# What a build without --target gives.
FROM services
