"""Writes and reads events with pika and the CloudEvents SDK for Python, a line for each."""

import sys
from datetime import datetime, timezone

import pika
from cloudevents.core.bindings import amqp, rabbitmq
from cloudevents.core.formats.json import JSONFormat
from cloudevents.core.v1.event import CloudEvent

what, url, place, mode, events = sys.argv[1:6]
events = int(events)
channel = pika.BlockingConnection(pika.URLParameters(url)).channel()


def event(n):
    attributes = {
        "id": f"id-{n}",
        "source": "/python/sdk",
        "type": "sdk.tried",
        "specversion": "1.0",
        "subject": f"süß {n}",
        "time": datetime(2026, 1, 2, 3, 4, 5, 678000, timezone.utc),
        "dataschema": "urn:schema:1",
        "datacontenttype": "application/json",
        "correlationid": f"c{n}",
        "partitionkey": f"key-{n}",
    }
    return CloudEvent(attributes=attributes, data={"n": n})


def message(n):
    """The headers, media type and body of an event."""
    if mode == "amqp1":
        # What the broker makes of such a message from a client of AMQP 1.0: application properties are headers.
        made = amqp.to_binary(event(n), JSONFormat())
        return made.application_properties, made.properties["content-type"], made.application_data
    write = rabbitmq.to_binary if mode == "binary" else rabbitmq.to_structured
    made = write(event(n), JSONFormat())
    return made.headers, made.content_type, made.body


if what == "write":
    channel.confirm_delivery()
    for n in range(events):
        headers, media, body = message(n)
        properties = pika.BasicProperties(headers=headers, content_type=media, delivery_mode=2)
        channel.basic_publish(place, "0", body, properties, mandatory=True)
else:
    for n in range(events):
        method, properties, body = channel.basic_get(place, auto_ack=True)
        read = rabbitmq.from_rabbitmq(
            rabbitmq.RabbitMQMessage(dict(properties.headers), properties.content_type, body), JSONFormat()
        )
        of = read.get_attributes()
        names = ["id", "source", "type", "subject", "time", "dataschema", "datacontenttype", "correlationid"]
        shown = [of[name].isoformat() if name == "time" else str(of[name]) for name in [*names, "partitionkey"]]
        print("\t".join([*shown, str(read.get_data()["n"])]))
