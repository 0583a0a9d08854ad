// A client of Leveret, written from docs/asyncapi.yaml and nothing else: it makes a VM, follows it, stops it, starts it
// and deletes it, and shows what a refusal looks like.
//
//   AMQP_URL=amqp://USER:PASSWORD@HOST:PORT/leveret PROJECT=default IMAGE=debian-12 node client.mjs
import { randomUUID } from 'node:crypto'
import { readFileSync } from 'node:fs'
import Ajv from 'ajv'
import formats from 'ajv-formats'
import amqp from 'amqplib'
import { load } from 'js-yaml'

const { AMQP_URL, PROJECT = 'default', IMAGE = 'debian-12' } = process.env
const USER = decodeURIComponent(new URL(AMQP_URL).username)
const CONTRACT = new URL(process.env.CONTRACT ?? '../../../docs/asyncapi.yaml', import.meta.url)

// The contract: where things are, what they are called, and what is valid.
const contract = load(readFileSync(CONTRACT, 'utf8'))
const requestsExchange = contract.channels.requests.bindings.amqp.exchange.name
const eventsExchange = contract.channels.vmEvents.bindings.amqp.exchange.name.replace('{project}', PROJECT)
const replyTo = contract.channels.verdicts.bindings.amqp.queue.name
const verdictType = contract.components.messages['request.verdict.v1'].name
const eventTypes = new Set(Object.keys(contract.channels.ownQueue.messages))
const filled = (address, names) => address.replace(/{(\w+)}/g, (_, name) => names[name])

const ajv = formats(new Ajv({ strict: false })).addSchema({ components: contract.components }, 'contract')
function check(name, part, document) {
  const pointer = `contract#/components/messages/${name}/${part}`
  const valid = ajv.getSchema(pointer) ?? ajv.compile({ $ref: pointer })
  if (!valid(document)) throw new Error(`${name} ${part}: ${ajv.errorsText(valid.errors)}`)
}

// Asking: publish with confirms, then hear the verdict by its correlation id. No verdict in time is no failure: the
// request is queued, and the events tell what becomes of it.
class Requests {
  #waiting = new Map()

  static async open(connection) {
    const requests = new Requests()
    requests.channel = await connection.createConfirmChannel()
    requests.channel.on('return', (message) => requests.#settle(message, new Error('nobody takes requests here')))
    await requests.channel.consume(replyTo, (message) => message && requests.#heard(message), { noAck: true })
    return requests
  }

  async ask(type, vmId, body = {}, more = {}) {
    const headers = { vm_id: vmId, request_id: randomUUID(), requested_at: String(Date.now() / 1000), ...more }
    const properties = {
      type,
      headers,
      userId: USER,
      contentType: contract.defaultContentType,
      messageId: randomUUID(),
      correlationId: headers.request_id,
      replyTo,
      persistent: true,
      mandatory: true,
    }
    check(type, 'headers', headers)
    const verdict = new Promise((resolve, reject) => {
      this.#waiting.set(properties.correlationId, { resolve, reject })
      setTimeout(() => this.#settle({ properties }, null), 10_000).unref()
    })
    const key = filled(contract.channels.requests.address, { type })
    const queued = new Promise((resolve, reject) => {
      const content = Buffer.from(JSON.stringify(body))
      this.channel.publish(requestsExchange, key, content, properties, (error) => (error ? reject(error) : resolve()))
    })
    await Promise.all([queued, verdict])
    return verdict
  }

  #heard(message) {
    const verdict = JSON.parse(message.content)
    if (message.properties.type === verdictType) check(verdictType, 'payload', verdict)
    this.#settle(message, verdict)
  }

  #settle({ properties }, outcome) {
    const waiting = this.#waiting.get(properties.correlationId)
    this.#waiting.delete(properties.correlationId)
    if (outcome instanceof Error) waiting?.reject(outcome)
    else waiting?.resolve(outcome)
  }
}

// Following: a queue of one's own, bound before anything is asked for. Events come at least once and in order:
// what is not newer than the newest is dropped.
class Events {
  #newest = 0n
  #watchers = new Set()

  static async open(connection, key) {
    const events = new Events()
    events.channel = await connection.createChannel()
    const queue = filled(contract.channels.ownQueue.address, { user: USER, name: `example-${randomUUID()}` })
    await events.channel.assertQueue(queue, { durable: true, arguments: { 'x-expires': 3_600_000 } })
    await events.channel.bindQueue(queue, eventsExchange, key)
    await events.channel.prefetch(100)
    await events.channel.consume(queue, (message) => message && events.#heard(message))
    events.queue = queue
    return events
  }

  // The first event that passes; `error` ends the waiting, for then there is nothing to wait for.
  until(passes) {
    return new Promise((resolve, reject) => {
      const watcher = (event) => {
        if (!passes(event) && event.data.state !== 'error') return
        this.#watchers.delete(watcher)
        if (passes(event)) resolve(event)
        else reject(new Error(JSON.stringify(event.data.problem)))
      }
      this.#watchers.add(watcher)
    })
  }

  async close() {
    await this.channel.deleteQueue(this.queue)
    await this.channel.close()
  }

  #heard(message) {
    const event = JSON.parse(message.content)
    if (BigInt(event.sequence) > this.#newest) {
      this.#newest = BigInt(event.sequence)
      if (eventTypes.has(event.type)) check(event.type, 'payload', event) // there may be types of tomorrow
      say(event.type, event.data.state ?? event.data.problem?.code)
      for (const watcher of [...this.#watchers]) watcher(event)
    }
    this.channel.ack(message)
  }
}

function say(...words) {
  console.log(words.filter((word) => word != null).join(' '))
}

function accepted(verdict) {
  if (verdict && !verdict.accepted) throw new Error(`${verdict.problem.code}: ${verdict.problem.message}`)
  say('verdict', verdict ? `accepted generation ${verdict.generation}` : 'none in time')
}

const connection = await amqp.connect(AMQP_URL)
const vmId = randomUUID()
const events = await Events.open(connection, filled(contract.channels.vmEvents.address, { vm_id: vmId, state: '*' }))
const requests = await Requests.open(connection)

async function change(type, body, state) {
  const arrived = events.until((event) => event.data.state === state)
  accepted(await requests.ask(type, vmId, body))
  await arrived
}

const wish = { vcpus: 1, memory_mib: 128, disk_gib: 1, image: { name: IMAGE }, labels: { made: 'in-javascript' } }
check('vm.create.v1', 'payload', wish)
await change('vm.create.v1', wish, 'running')
accepted(await requests.ask('vm.create.v1', vmId, wish)) // asked again, it is still one VM
await change('vm.stop.v1', { grace_s: 5 }, 'stopped')
await change('vm.start.v1', {}, 'running')

const refused = await requests.ask('vm.create.v1', randomUUID(), { ...wish, image: { name: 'no-such-image' } })
say('refused', refused.problem.code, '-', refused.problem.message, '-', refused.problem.hint)

await change('vm.delete.v1', {}, 'deleted')
await events.close()
await connection.close()
