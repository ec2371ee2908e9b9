#!/bin/bash
# Makes the topics that are missing, with the settings that the flow relies on; those that exist are left as they are.
# Environment: BROKERS, TOPIC, GROUP, PARTITIONS, TIERS (as many as RETRY_DELAYS has).
set -eu
kafka_topics() { /opt/kafka/bin/kafka-topics.sh --bootstrap-server "$BROKERS" "$@"; }
create() { # topic, setting...
    local topic=$1 settings=()
    shift
    for setting in "$@"; do settings+=(--config "$setting"); done
    kafka_topics --create --if-not-exists --topic "$topic" --partitions "${partitions:-$PARTITIONS}" \
        --replication-factor 1 "${settings[@]}"
}
# Kafka's own default for the largest batch; redirected records carry their history in headers, so 64 KiB more.
create "$TOPIC" max.message.bytes=1048588
for tier in $(seq "$TIERS"); do
    # A tier's delay counts from the broker's clock, not from the clock of whoever redirected the record.
    create "$TOPIC.$GROUP.retry.$tier" max.message.bytes=1114124 message.timestamp.type=LogAppendTime
done
# A dead letter stays until a person has dealt with it.
create "$TOPIC.$GROUP.dlt" max.message.bytes=1114124 retention.ms=-1
# Of Debezium, if it is the relay.
partitions=1 create __debezium-heartbeat.logistics retention.ms=3600000
