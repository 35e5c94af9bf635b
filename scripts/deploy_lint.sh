#!/usr/bin/env bash
# Lints deploy/, which is built nowhere in the tests: Dockerfile (hadolint), compose file (the
# schema of the compose specification), YAML; Prometheus's own check where `promtool` is installed.
set -euo pipefail
cd "$(dirname "$0")/.."

hadolint --config deploy/hadolint.yml deploy/Dockerfile
check-jsonschema --builtin-schema vendor.compose-spec deploy/compose.yaml
yamllint --strict --config-file deploy/yamllint.yml deploy mkdocs.yml
if command -v promtool >/dev/null; then
    promtool check config --lint=all --lint-fatal deploy/prometheus.yml
else
    echo "not checked: deploy/prometheus.yml by promtool (Debian: apt-get install prometheus)"
fi
echo "deploy/ is clean"
