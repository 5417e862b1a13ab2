import io.cloudevents.CloudEvent;
import io.cloudevents.core.builder.CloudEventBuilder;
import io.cloudevents.jackson.JsonFormat;
import io.cloudevents.kafka.CloudEventDeserializer;
import io.cloudevents.kafka.CloudEventSerializer;
import java.net.URI;
import java.nio.charset.StandardCharsets;
import java.time.Duration;
import java.time.OffsetDateTime;
import java.util.ArrayList;
import java.util.HashMap;
import java.util.HexFormat;
import java.util.Map;
import java.util.Random;
import org.apache.kafka.clients.consumer.ConsumerRecord;
import org.apache.kafka.clients.consumer.KafkaConsumer;
import org.apache.kafka.clients.producer.KafkaProducer;
import org.apache.kafka.clients.producer.ProducerRecord;
import org.apache.kafka.common.TopicPartition;
import org.apache.kafka.common.serialization.ByteArrayDeserializer;
import org.apache.kafka.common.serialization.ByteArraySerializer;

/** Writes and reads events with the Java client and the CloudEvents SDK, a line for each. */
public class Sdk {
    public static void main(String[] arguments) throws Exception {
        switch (arguments[0]) {
            case "write" -> write(arguments[1], arguments[2], arguments[3], Integer.parseInt(arguments[4]));
            case "read" -> read(arguments[1], arguments[2], Integer.parseInt(arguments[3]));
            default -> throw new IllegalArgumentException(arguments[0]);
        }
    }

    static void write(String servers, String topic, String encoding, int events) throws Exception {
        Map<String, Object> config = new HashMap<>();
        config.put("bootstrap.servers", servers);
        config.put("key.serializer", ByteArraySerializer.class);
        config.put("value.serializer", CloudEventSerializer.class);
        config.put(CloudEventSerializer.ENCODING_CONFIG, encoding);
        if (encoding.equals("STRUCTURED")) {
            config.put(CloudEventSerializer.EVENT_FORMAT_CONFIG, JsonFormat.CONTENT_TYPE);
        }
        Random random = new Random(7);
        try (KafkaProducer<byte[], CloudEvent> producer = new KafkaProducer<>(config)) {
            for (int n = 0; n < events; n++) {
                byte[] key = ("key-" + n).getBytes(StandardCharsets.UTF_8);
                if (n % 2 == 1) {
                    key = new byte[1 + random.nextInt(40)];
                    random.nextBytes(key);
                }
                CloudEvent event = CloudEventBuilder.v1()
                    .withId("id-" + n)
                    .withSource(URI.create("/java/sdk"))
                    .withType("sdk.tried")
                    .withSubject("süß " + n)
                    .withTime(OffsetDateTime.parse("2026-01-02T03:04:05.678Z"))
                    .withDataSchema(URI.create("urn:schema:1"))
                    .withExtension("correlationid", "c" + n)
                    .withData("application/json", ("{\"n\":" + n + "}").getBytes(StandardCharsets.UTF_8))
                    .build();
                var sent = producer.send(new ProducerRecord<>(topic, key, event)).get();
                System.out.println(sent.partition() + "\t" + sent.offset() + "\t" + HexFormat.of().formatHex(key));
            }
        }
    }

    static void read(String servers, String topic, int events) {
        Map<String, Object> config = new HashMap<>();
        config.put("bootstrap.servers", servers);
        config.put("key.deserializer", ByteArrayDeserializer.class);
        config.put("value.deserializer", CloudEventDeserializer.class);
        try (KafkaConsumer<byte[], CloudEvent> consumer = new KafkaConsumer<>(config)) {
            var partitions = new ArrayList<TopicPartition>();
            consumer.partitionsFor(topic).forEach(of -> partitions.add(new TopicPartition(topic, of.partition())));
            consumer.assign(partitions);
            consumer.seekToBeginning(partitions);
            long end = System.nanoTime() + Duration.ofSeconds(30).toNanos();
            for (int n = 0; n < events; ) {
                if (System.nanoTime() > end) {
                    throw new IllegalStateException("only " + n + " of " + events);
                }
                for (ConsumerRecord<byte[], CloudEvent> record : consumer.poll(Duration.ofMillis(200))) {
                    CloudEvent event = record.value();
                    byte[] data = event.getData() == null ? new byte[0] : event.getData().toBytes();
                    System.out.println(String.join("\t",
                        String.valueOf(record.partition()), String.valueOf(record.offset()),
                        HexFormat.of().formatHex(record.key()), event.getId(), event.getSource().toString(),
                        event.getType(), String.valueOf(event.getSubject()), String.valueOf(event.getTime()),
                        String.valueOf(event.getDataSchema()), String.valueOf(event.getDataContentType()),
                        String.valueOf(event.getExtension("correlationid")),
                        HexFormat.of().formatHex(data)));
                    n++;
                }
            }
        }
    }
}
