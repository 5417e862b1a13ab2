// Writes and reads events with the NATS client and the CloudEvents SDK for Go, a line for each.
package main

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	binding "github.com/cloudevents/sdk-go/protocol/nats_jetstream/v2"
	sdk "github.com/cloudevents/sdk-go/v2"
	modes "github.com/cloudevents/sdk-go/v2/binding"
	"github.com/nats-io/nats.go"
)

func main() {
	events, err := strconv.Atoi(os.Args[5])
	must(err)
	connection, err := nats.Connect(os.Args[2])
	must(err)
	defer connection.Close()
	stream, err := connection.JetStream()
	must(err)
	subject := os.Args[3]
	switch os.Args[1] {
	case "write":
		write(stream, subject, os.Args[4], events)
	case "read":
		read(stream, subject, events)
	}
}

func must(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func write(stream nats.JetStreamContext, subject, mode string, events int) {
	ctx := modes.WithForceBinary(context.Background())
	if mode == "structured" {
		ctx = modes.WithForceStructured(context.Background())
	}
	for n := 0; n < events; n++ {
		event := sdk.NewEvent()
		event.SetID(fmt.Sprintf("id-%d", n))
		event.SetSource("/go/sdk")
		event.SetType("sdk.tried")
		event.SetSubject(fmt.Sprintf("subject-%d", n))
		event.SetTime(time.Date(2026, 1, 2, 3, 4, 5, 678_000_000, time.UTC))
		event.SetDataSchema("urn:schema:1")
		event.SetExtension("correlationid", fmt.Sprintf("c%d", n))
		event.SetExtension("partitionkey", fmt.Sprintf("key-%d", n))
		must(event.SetData("application/json", map[string]int{"n": n}))
		body := new(bytes.Buffer)
		header, err := binding.WriteMsg(ctx, modes.ToMessage(&event), body)
		must(err)
		_, err = stream.PublishMsg(&nats.Msg{Subject: subject, Header: header, Data: body.Bytes()})
		must(err)
	}
}

func read(stream nats.JetStreamContext, subject string, events int) {
	subscription, err := stream.SubscribeSync(subject, nats.DeliverAll(), nats.OrderedConsumer())
	must(err)
	for n := 0; n < events; n++ {
		message, err := subscription.NextMsg(10 * time.Second)
		must(err)
		event, err := modes.ToEvent(context.Background(), binding.NewMessage(message))
		must(err)
		extensions := event.Extensions()
		fmt.Println(strings.Join([]string{
			event.ID(), event.Source(), event.Type(), event.Subject(),
			event.Time().UTC().Format("2006-01-02T15:04:05.000Z"), event.DataSchema(), event.DataContentType(),
			fmt.Sprint(extensions["correlationid"]), fmt.Sprint(extensions["partitionkey"]), string(event.Data()),
		}, "\t"))
	}
}
