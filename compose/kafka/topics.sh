#!/bin/bash
# Makes the topics that are missing, with the settings that the flow relies on; those that exist are left as they are.
# Environment: BROKERS, TOPIC, GROUP, PARTITIONS, TIERS (as many as RETRY_DELAYS has).
set -eu
export KAFKA_HEAP_OPTS=-Xmx96m
kafka_topics() { /opt/kafka/bin/kafka-topics.sh --bootstrap-server "$BROKERS" "$@"; }
existing=$(kafka_topics --list)
jobs=()
create() { # topic, partitions, setting...
    local topic=$1 partitions=$2 settings=()
    shift 2
    if grep -qxF "$topic" <<<"$existing"; then return; fi
    for setting in "$@"; do settings+=(--config "$setting"); done
    # Each takes a Java machine a second or two: at the same time.
    kafka_topics --create --if-not-exists --topic "$topic" --partitions "$partitions" --replication-factor 1 "${settings[@]}" &
    jobs+=($!)
}
# Kafka's own default for the largest batch; redirected records carry their history in headers, so 64 KiB more.
create "$TOPIC" "$PARTITIONS" max.message.bytes=1048588
for tier in $(seq "$TIERS"); do
    # A tier's delay counts from the broker's clock, not from the clock of whoever redirected the record.
    create "$TOPIC.$GROUP.retry.$tier" "$PARTITIONS" max.message.bytes=1114124 message.timestamp.type=LogAppendTime
done
# A dead letter stays until a person has dealt with it.
create "$TOPIC.$GROUP.dlt" "$PARTITIONS" max.message.bytes=1114124 retention.ms=-1
# Of Debezium, if it is the relay.
create __debezium-heartbeat.logistics 1 retention.ms=3600000
for job in "${jobs[@]}"; do wait "$job"; done
