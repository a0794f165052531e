# docker build -t sonnette .
# docker run -p 8080:8080 -v sonnette:/var/lib/sonnette sonnette
# Settings: mount a folder with sonnette.toml and keys/ over /etc/sonnette, or set SONNETTE_<SECTION>__<KEY>.

FROM rust:1-slim-bookworm AS build
WORKDIR /src
COPY . .
RUN cargo build --profile dist --locked --bin sonnette

FROM debian:bookworm-slim
RUN groupadd --system --gid 10001 sonnette \
 && useradd --system --uid 10001 --gid sonnette --home-dir /var/lib/sonnette --shell /usr/sbin/nologin sonnette \
 && install -d -o sonnette -g sonnette -m 0750 /var/lib/sonnette \
 && install -d /etc/sonnette \
 && printf '%s\n' \
    '# The defaults of the image. Paths are relative to this file.' \
    '[server]' \
    'listen = "0.0.0.0:8080"' \
    '[database]' \
    'url = "sqlite:///var/lib/sonnette/sonnette.db"' \
    > /etc/sonnette/sonnette.toml
COPY --from=build /src/target/dist/sonnette /usr/local/bin/sonnette

USER 10001:10001
WORKDIR /var/lib/sonnette
VOLUME /var/lib/sonnette
EXPOSE 8080
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s CMD ["sonnette", "health"]
ENTRYPOINT ["sonnette"]
CMD ["serve"]
