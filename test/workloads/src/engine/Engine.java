package engine;

import java.io.BufferedReader;
import java.io.IOException;
import java.io.InputStreamReader;
import java.io.PrintWriter;
import java.net.InetAddress;
import java.net.ServerSocket;
import java.net.Socket;
import java.nio.charset.StandardCharsets;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.ArrayList;
import java.util.HashSet;
import java.util.List;
import java.util.Set;
import java.util.concurrent.CompletableFuture;
import java.util.concurrent.LinkedBlockingQueue;
import org.apache.logging.log4j.LogManager;
import org.apache.logging.log4j.Logger;
import org.rocksdb.RocksDBException;

/**
 * A small engine of process instances that keeps its data as a Zeebe broker does, on the same RocksDB: commands are
 * appended to a mapped journal, flushed, applied to the state and answered; the state is snapshotted by hard links and the
 * journal compacted; backups go to S3. It is no Zeebe.
 *
 * <p>Arguments: the data directory, the S3 endpoint, the bucket, and a backup to restore from before the start, if any.
 * Prints {@code READY PORT}. A line of a client is a command, a line back its answer:
 *
 * <ul>
 *   <li>{@code CREATE PAYLOAD}: OK and the id, once durable
 *   <li>{@code COMPLETE ID}: OK once durable
 *   <li>{@code DUMP}: one line for each instance, ID STATE PAYLOAD, then END
 *   <li>{@code BACKUP NAME}: OK once all of it is stored, or FAILED and why
 * </ul>
 */
public final class Engine {
  private static final Logger LOG = LogManager.getLogger(Engine.class);

  /** Zeebe's segments have 128 MB; smaller ones are rolled and deleted during a test. */
  private static final int SEGMENT = 16 << 20;

  private static final int BATCH = 100;
  private static final int SNAPSHOT_EVERY = 20_000;
  private static final long LOW_DISK = 1L << 30;

  private final Path data;
  private final Journal journal;
  private final State state;
  private final Snapshots snapshots;
  private final MetaStore meta;
  private final BackupStore backups;
  private final LinkedBlockingQueue<Command> queue = new LinkedBlockingQueue<>();
  private final Set<Long> completing = new HashSet<>(); // by the batch under way
  private long position;
  private long snapshotted;

  private record Command(String text, CompletableFuture<String> answer) {}

  public static void main(String[] args) throws Exception {
    var data = Path.of(args[0]);
    var backups = new BackupStore(args[1], args[2]);
    if (args.length > 3) {
      backups.restore(args[3], data);
      LOG.info("restored {}", args[3]);
    }
    var engine = new Engine(data, backups);
    Thread.setDefaultUncaughtExceptionHandler((thread, e) -> {
      LOG.error("{} has failed", thread.getName(), e);
      Runtime.getRuntime().halt(1);
    });
    new Thread(engine::process, "processor").start();
    new Thread(engine::watchDisk, "disk monitor").start();
    try (var listener = new ServerSocket(0, 50, InetAddress.getLoopbackAddress())) {
      System.out.println("READY " + listener.getLocalPort());
      while (true) {
        var client = listener.accept();
        new Thread(() -> engine.serve(client), "client").start();
      }
    }
  }

  private Engine(Path data, BackupStore backups) throws IOException, RocksDBException {
    this.data = Files.createDirectories(data);
    this.backups = backups;
    snapshots = new Snapshots(data);
    var runtime = data.resolve("runtime");
    Directories.delete(runtime); // without a write-ahead log it is worth nothing
    var latest = snapshots.latest();
    if (latest != null) {
      snapshotted = Snapshots.position(latest);
      Snapshots.open(latest, runtime);
    }
    state = new State(runtime);
    journal = new Journal(data.resolve("journal"), SEGMENT);
    meta = new MetaStore(data.resolve("meta"));
    position = snapshotted;
    for (var entry : journal.replay(snapshotted)) {
      state.apply(entry);
      position = entry.position();
    }
    if (position < meta.load()) {
      throw new IOException("the journal ends at " + position + ", flushed were " + meta.load());
    }
    LOG.info("snapshot {}, journal up to {}", snapshotted, position);
  }

  private void serve(Socket client) {
    try (client;
        var in = new BufferedReader(new InputStreamReader(client.getInputStream(), StandardCharsets.UTF_8));
        var out = new PrintWriter(client.getOutputStream(), true, StandardCharsets.UTF_8)) {
      for (String line; (line = in.readLine()) != null; ) {
        var command = new Command(line, new CompletableFuture<>());
        queue.add(command);
        out.println(command.answer.join());
      }
    } catch (IOException e) {
      LOG.info("a client has left: {}", e.getMessage());
    }
  }

  /** Takes what waits, makes it durable with one flush, carries it out and answers. */
  private void process() {
    try {
      while (true) {
        var batch = new ArrayList<Command>();
        batch.add(queue.take());
        queue.drainTo(batch, BATCH - 1);
        commit(batch);
        if (position - snapshotted >= SNAPSHOT_EVERY) {
          snapshot();
        }
      }
    } catch (IOException | InterruptedException | RocksDBException e) {
      throw new IllegalStateException("the processor has failed", e);
    }
  }

  private void commit(List<Command> batch) throws IOException, RocksDBException {
    var accepted = new ArrayList<Command>();
    var entries = new ArrayList<Journal.Entry>();
    completing.clear();
    var others = new ArrayList<Command>();
    for (var command : batch) {
      if (command.text.equals("DUMP") || command.text.startsWith("BACKUP ")) {
        others.add(command); // of the state after this batch
      } else if (valid(command.text)) {
        var content = command.text.getBytes(StandardCharsets.UTF_8);
        position = journal.append(content);
        entries.add(new Journal.Entry(position, content));
        accepted.add(command);
      } else {
        command.answer.complete("REJECTED");
      }
    }
    if (!entries.isEmpty()) {
      journal.flush();
      meta.store(position);
    }
    for (int i = 0; i < entries.size(); i++) {
      state.apply(entries.get(i));
      accepted.get(i).answer.complete("OK " + entries.get(i).position());
    }
    for (var command : others) {
      if (command.text.equals("DUMP")) {
        command.answer.complete(dump());
      } else {
        backup(command);
      }
    }
  }

  private boolean valid(String text) throws RocksDBException {
    if (text.startsWith("CREATE ")) {
      return true;
    }
    if (!text.startsWith("COMPLETE ")) {
      return false;
    }
    long id = Long.parseLong(text.substring("COMPLETE ".length()));
    return state.active(id) && completing.add(id);
  }

  private String dump() throws RocksDBException {
    var text = new StringBuilder();
    state.each((id, value) -> text.append(id).append(' ').append((char) value[0]).append(' ').append(new String(value, 1, value.length - 1, StandardCharsets.UTF_8)).append('\n'));
    return text.append("END").toString();
  }

  private Path snapshot() throws IOException, RocksDBException {
    var taken = snapshots.take(state, position);
    journal.compact(snapshotted); // one snapshot behind, so that a backup has segments too
    snapshotted = position;
    return taken;
  }

  /** Holds the files of this moment by hard links, and stores them aside of the work that goes on. */
  private void backup(Command command) throws IOException, RocksDBException {
    var name = command.text.substring("BACKUP ".length());
    var held = data.resolve("backup-" + name);
    var taken = snapshot();
    journal.roll();
    link(Directories.files(taken), held.resolve("snapshots").resolve(taken.getFileName()));
    link(journal.files(position), held.resolve("journal"));
    new Thread(() -> {
      String answer;
      try {
        backups.save(name, held);
        answer = "OK";
      } catch (Exception e) {
        LOG.warn("backup {} has failed", name, e);
        answer = "FAILED " + e;
      }
      try {
        Directories.delete(held);
      } catch (IOException e) {
        throw new IllegalStateException(e);
      }
      command.answer.complete(answer.replace('\n', ' '));
    }, "backup").start();
  }

  private static void link(List<Path> files, Path directory) throws IOException {
    Files.createDirectories(directory);
    for (var file : files) {
      Files.createLink(directory.resolve(file.getFileName()), file);
    }
  }

  /** Asks for the free space every second, as Zeebe's disk monitor does: statvfs of the data directory, 0 for an error. */
  private void watchDisk() {
    try {
      while (true) {
        long began = System.nanoTime();
        long free = data.toFile().getUsableSpace();
        long took = (System.nanoTime() - began) / 1_000_000;
        if (free < LOW_DISK || took > 1000) {
          LOG.warn("disk monitor: {} bytes free, asked for {} ms", free, took);
        }
        Thread.sleep(1000);
      }
    } catch (InterruptedException e) {
      throw new IllegalStateException("the disk monitor has failed", e);
    }
  }
}
