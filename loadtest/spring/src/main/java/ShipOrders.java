import com.fasterxml.jackson.databind.JsonNode;
import com.fasterxml.jackson.databind.ObjectMapper;
import com.zaxxer.hikari.HikariConfig;
import com.zaxxer.hikari.HikariDataSource;
import java.io.IOException;
import java.io.UncheckedIOException;
import java.util.ArrayList;
import java.util.HashMap;
import java.util.List;
import java.util.Map;
import java.util.concurrent.atomic.AtomicLong;
import org.apache.kafka.clients.consumer.ConsumerConfig;
import org.apache.kafka.clients.consumer.ConsumerRecord;
import org.apache.kafka.common.serialization.StringDeserializer;
import org.springframework.jdbc.core.JdbcTemplate;
import org.springframework.jdbc.datasource.DataSourceTransactionManager;
import org.springframework.kafka.core.DefaultKafkaConsumerFactory;
import org.springframework.kafka.listener.BatchMessageListener;
import org.springframework.kafka.listener.ConcurrentMessageListenerContainer;
import org.springframework.kafka.listener.ContainerProperties;
import org.springframework.kafka.listener.MessageListener;
import org.springframework.transaction.support.TransactionTemplate;

/**
 * Spring Kafka on the same work as ship-orders.rs: an inbox row and the update of an order for each event, in one transaction
 * for each record (`record`) or for each batch that a poll brings (`batch`). A batch is not isolated: an event that fails takes
 * the others with it. Says `done` once so many events are through, and goes on until it is ended.
 */
public final class ShipOrders {
    private static final String INSERT =
        "INSERT INTO %1$s.inbox (consumer, event_id) VALUES ('orders', ?::uuid) ON CONFLICT DO NOTHING";
    private static final String UPDATE =
        "UPDATE %1$s.orders SET status = 'SHIPPED', shipped_at = now() WHERE id = ?";

    private final ObjectMapper json = new ObjectMapper();
    private final AtomicLong through = new AtomicLong();
    private final long events = Long.parseLong(setting("EVENTS"));
    private final String insert = INSERT.formatted(setting("SCHEMA"));
    private final String update = UPDATE.formatted(setting("SCHEMA"));
    private final JdbcTemplate jdbc;
    private final TransactionTemplate transaction;

    private ShipOrders(HikariDataSource pool) {
        jdbc = new JdbcTemplate(pool);
        transaction = new TransactionTemplate(new DataSourceTransactionManager(pool));
    }

    public static void main(String[] arguments) {
        int threads = Integer.parseInt(setting("THREADS"));
        HikariConfig database = new HikariConfig();
        database.setJdbcUrl(setting("JDBC_URL") + "?reWriteBatchedInserts=true");
        database.setUsername(setting("DATABASE_USER"));
        database.setPassword(setting("DATABASE_PASSWORD"));
        database.setMaximumPoolSize(threads + 2);
        ShipOrders work = new ShipOrders(new HikariDataSource(database));

        ContainerProperties properties = new ContainerProperties(setting("TOPIC"));
        switch (setting("LISTENER")) {
            case "record" -> {
                properties.setAckMode(ContainerProperties.AckMode.RECORD);
                properties.setMessageListener((MessageListener<String, String>) work::ship);
            }
            case "batch" -> {
                properties.setAckMode(ContainerProperties.AckMode.BATCH);
                properties.setMessageListener((BatchMessageListener<String, String>) work::shipAll);
            }
            default -> throw new IllegalArgumentException("LISTENER: record or batch");
        }
        Map<String, Object> consumer = new HashMap<>();
        consumer.put(ConsumerConfig.BOOTSTRAP_SERVERS_CONFIG, setting("KAFKA_BROKERS"));
        consumer.put(ConsumerConfig.GROUP_ID_CONFIG, setting("GROUP"));
        consumer.put(ConsumerConfig.AUTO_OFFSET_RESET_CONFIG, "earliest");
        consumer.put(ConsumerConfig.ENABLE_AUTO_COMMIT_CONFIG, false);
        consumer.put(ConsumerConfig.MAX_POLL_RECORDS_CONFIG, 500);
        var factory = new DefaultKafkaConsumerFactory<>(consumer, new StringDeserializer(), new StringDeserializer());
        var container = new ConcurrentMessageListenerContainer<>(factory, properties);
        container.setConcurrency(threads);
        container.start();
    }

    private void ship(ConsumerRecord<String, String> record) {
        JsonNode event = read(record);
        transaction.executeWithoutResult(status -> {
            if (jdbc.update(insert, event.get("id").asText()) == 1) {
                jdbc.update(update, event.get("aggregateId").asLong());
            }
        });
        count(1);
    }

    private void shipAll(List<ConsumerRecord<String, String>> records) {
        List<Object[]> ids = new ArrayList<>();
        List<Object[]> orders = new ArrayList<>();
        for (ConsumerRecord<String, String> record : records) {
            JsonNode event = read(record);
            ids.add(new Object[] {event.get("id").asText()});
            orders.add(new Object[] {event.get("aggregateId").asLong()});
        }
        transaction.executeWithoutResult(status -> {
            jdbc.batchUpdate(insert, ids);
            jdbc.batchUpdate(update, orders);
        });
        count(records.size());
    }

    private JsonNode read(ConsumerRecord<String, String> record) {
        try {
            return json.readTree(record.value());
        } catch (IOException broken) {
            throw new UncheckedIOException(broken);
        }
    }

    private void count(long more) {
        long now = through.addAndGet(more);
        if (now >= events && now - more < events) {
            System.out.println("done");
        }
    }

    private static String setting(String name) {
        String value = System.getenv(name);
        if (value == null) {
            throw new IllegalArgumentException(name + " is not set");
        }
        return value;
    }
}
